"""Functions that tests of the MoE metrics run on rank processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from train_on_ranks import begin
from verify_on_ranks import pad

from megatron_moe.config.errors import RunError
from megatron_moe.config.schema import Experiment
from megatron_moe.model.moe.statistics import RoutingStatistics
from megatron_moe.training.callback import Record
from megatron_moe.training.moe_sums import routers_of

Seen = dict[str, Any]
"""What one layer's router did with one microbatch: `layer`, and arrays `logits` and `scores` [t, e],
`experts` [t, k], `kept` [t, k] and `valid` [t] bool."""


def steps(experiment: Experiment, run: Path, count: int, padded: bool) -> list[Record]:
    """The records of the first steps."""
    trainer = begin(experiment, run)
    if padded:
        pad(trainer)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    return [trainer.step(batches) for _ in range(count)]


def seen(experiment: Experiment, run: Path, padded: bool) -> tuple[Record, list[Seen]]:
    """The record of the first step, and what each router did. For one process."""
    trainer = begin(experiment, run)
    if padded:
        pad(trainer)
    layers = {id(router.statistics): router.layer_number for router in routers_of(trainer.chunks[0])}
    found: list[Seen] = []
    record = RoutingStatistics.record

    def watch(self: Any, logits: Any, choice: Any, routing: Any, microbatch: Any) -> None:
        there = torch.ones_like(routing.experts, dtype=torch.bool)
        found.append(
            {
                "layer": layers[id(self)],
                "logits": logits.detach().double().numpy(),
                "scores": choice.scores.detach().double().numpy(),
                "experts": routing.experts.numpy(),
                "kept": (there if routing.kept is None else routing.kept).numpy(),
                "valid": (there[:, 0] if microbatch.valid is None else microbatch.valid).numpy(),
            }
        )
        record(self, logits, choice, routing, microbatch)

    RoutingStatistics.record = watch  # type: ignore[method-assign]
    try:
        written = trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    finally:
        RoutingStatistics.record = record  # type: ignore[method-assign]
    return written, found


def balancing_losses(experiment: Experiment, run: Path) -> tuple[float, float, float]:
    """`moe/aux_loss` and `moe/loss/aux_loss` of the first step, and the mean over layers and microbatches of
    Megatron-Core's function for the same scores and counts. For one process."""
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    record, found = seen(experiment, run, padded=False)
    theirs = [
        float(
            switch_load_balancing_loss_func(
                torch.tensor(layer["scores"]),
                torch.tensor(np.bincount(layer["experts"].ravel(), minlength=layer["scores"].shape[1])),
                *layer["experts"].shape,
                layer["scores"].shape[1],
                1.0,
            )
        )
        for layer in found
    ]
    return record["moe/aux_loss"], record["moe/loss/aux_loss"], sum(theirs) / len(theirs)


def with_broken_logits(
    experiment: Experiment, run: Path, layer: int, rank: int, value: float
) -> dict[str, Any]:
    """A step in which one rank's router of one layer has a weight that is not finite, or for an infinite
    `value` only one logit: the words of the RunError, and whether any other weight changed."""
    trainer = begin(experiment, run)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    trainer.step(batches)
    if dist.get_rank() == rank:
        for router in (router for chunk in trainer.chunks for router in routers_of(chunk)):
            if router.layer_number == layer:
                _break(router, value)
    chunks = [list(chunk.parameters()) for chunk in trainer.chunks]
    before = [[weight.detach().clone() for weight in chunk] for chunk in chunks]
    words = ""
    try:
        trainer.step(batches)
    except RunError as error:
        words = str(error)
    changed = any(
        not torch.equal(a.nan_to_num(), b.detach().nan_to_num())
        for old, new in zip(before, chunks, strict=True)
        for a, b in zip(old, new, strict=True)
    )
    return {"words": words, "changed": changed, "iteration": trainer.iteration}


def _break(router: Any, value: float) -> None:
    if math.isnan(value):
        router.weight.data[0, 0] = value
        return
    compute = router._logits

    def one_infinite(tokens: torch.Tensor) -> torch.Tensor:
        logits = compute(tokens)
        spoilt = torch.zeros_like(logits)
        spoilt[0, 0] = value
        return logits + spoilt

    router._logits = one_infinite


def drops_of_evaluation(experiment: Experiment, run: Path) -> tuple[Record, Record, list[int]]:
    """What `evaluate` returns, the record of a step after it, and the rows that evaluation left for the
    metrics of training."""
    trainer = begin(experiment, run)
    valid = trainer.datasets.valid
    assert valid is not None
    evaluated = trainer.evaluate(valid, experiment.training.eval_iters)
    rows = [len(router.statistics.rows) for router in routers_of(trainer.chunks[0])]
    return evaluated, trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True)), rows
