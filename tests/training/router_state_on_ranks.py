"""Functions that tests of what routers carry between iterations run on rank processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from train_on_ranks import begin
from verify_on_ranks import pad

from megatron_moe.config.schema import Experiment
from megatron_moe.model.moe.router import Router
from megatron_moe.model.moe.routing import Routing
from megatron_moe.training.callback import Record
from megatron_moe.training.moe_sums import routers_of
from megatron_moe.training.trainer import Trainer

State = dict[str, Tensor]
"""By layer and name."""


def state_of(trainer: Trainer) -> State:
    """What the routers of this rank carry: copies."""
    return {
        f"{router.layer_number}.{name}": value.clone()
        for chunk in trainer.chunks
        for router in routers_of(chunk)
        for name, value in router.named_buffers()
    }


def steps(
    experiment: Experiment, run: Path, count: int, padded: bool = False
) -> tuple[list[Record], list[State]]:
    """The records of the first steps, and what this rank's routers carry before each and after the last."""
    trainer = begin(experiment, run)
    if padded:
        pad(trainer)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    states, records = [state_of(trainer)], []
    for _ in range(count):
        records.append(trainer.step(batches))
        states.append(state_of(trainer))
    return records, states


def loads(experiment: Experiment, run: Path, count: int) -> tuple[list[dict[int, Tensor]], list[State]]:
    """What each layer's experts got of the targets of each step, before drops, counted where tokens are
    routed; and the states. For one process; samples have padding."""
    trainer = begin(experiment, run)
    pad(trainer)
    counted: list[dict[int, Tensor]] = []

    def count_routed(router: Router, arguments: tuple[Any, ...], routing: Routing) -> None:
        marks = arguments[1]
        valid = torch.ones(len(routing.experts), dtype=torch.bool) if marks is None else ~marks.reshape(-1)
        load = torch.bincount(routing.experts[valid].flatten(), minlength=router.moe.num_moe_experts)
        of_layers = counted[-1]
        of_layers[router.layer_number] = of_layers.get(router.layer_number, torch.zeros_like(load)) + load

    for router in routers_of(trainer.chunks[0]):
        router.register_forward_hook(count_routed)  # type: ignore[arg-type]
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    states = [state_of(trainer)]
    for _ in range(count):
        counted.append({})
        trainer.step(batches)
        states.append(state_of(trainer))
    return counted, states


def undisturbed(experiment: Experiment, run: Path) -> dict[str, bool]:
    """Whether routers carry the same after evaluation, and after a step that is skipped, as before; and
    something else after a step. And whether evaluation left losses behind."""
    trainer = begin(experiment, run)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    trainer.step(batches)
    found = {}
    before = state_of(trainer)
    assert trainer.datasets.valid is not None
    trainer.evaluate(trainer.datasets.valid, 1)
    found["evaluation"] = _same(before, state_of(trainer))
    found["no losses"] = not any(
        router.balancing.values for chunk in trainer.chunks for router in routers_of(chunk)
    )
    hook = None
    if dist.get_rank() == dist.get_world_size() - 1:
        weight = next(trainer.chunks[0].parameters())
        hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    assert "skipped" in trainer.step(batches)
    found["skipped"] = _same(before, state_of(trainer))
    if hook is not None:
        hook.remove()
    trainer.step(batches)
    found["step"] = _same(before, state_of(trainer))
    return found


def _same(one: State, other: State) -> bool:
    return bool(one) and all(torch.equal(value, other[name]) for name, value in one.items())
