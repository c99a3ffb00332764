"""`megatron-moe verify`: does a layout compute what one process computes?

First the ranks of the layout train a few steps and write down, for each step, the loss, the gradient norm,
every gradient before clipping and every weight after the update. Then one process loads the weights that the
ranks started from, takes the same batches, and compares as it goes.

Every copy that any rank holds of a tensor is compared, each layer and each expert by itself. Dropout is
switched off: what it draws depends on the layout by nature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import checkpoint, gradients, groups, pieces
from megatron_moe.plan import plan
from megatron_moe.training import verify_differences as differences
from megatron_moe.training.build import start
from megatron_moe.training.callback import Record
from megatron_moe.training.starting import begin_from
from megatron_moe.training.trainer import Trainer
from megatron_moe.training.verify_report import Report, Step, Tolerances, announcement, print_report

_RECORDS = "records.json"


def run_part(folder: Path, part: str, experiment: Experiment, steps: int, tolerance: float | None) -> int:
    """One part of `verify`, on every rank of it.

    Args:
        folder: shared by both parts.
        part: `layout` writes down what its ranks compute; `reference`, in one process and after it, compares.
        tolerance: largest relative difference at the first step; None: what the precision allows.

    Returns:
        1 where `reference` finds a larger difference, else 0. Raises InputError.
    """
    experiment, switched_off = without_draws(experiment)
    # The reference has another layout than what was profiled.
    its_plan = plan.make(experiment, profiled=False)
    if part == "layout" and os.environ.get("RANK", "0") == "0":
        print(announcement(experiment.name, its_plan.layout, steps), flush=True)
    trainer = start(experiment, its_plan, folder / part)
    if part == "layout":
        record(trainer, steps, folder)
        groups.shutdown()
        return 0
    report = compare(trainer, steps, folder, tolerance)
    groups.shutdown()
    print_report(report, switched_off)
    return 0 if report.passed else 1


def without_draws(experiment: Experiment) -> tuple[Experiment, list[str]]:
    """The experiment without what draws from a rank's random state while it trains, and the keys that were
    switched off. Routers draw by the position of a token, the same in every layout."""
    model, moe = experiment.model, experiment.moe
    off = {name: 0.0 for name in ("hidden_dropout", "attention_dropout") if getattr(model, name)}
    names = [f"model.{name}" for name in off]
    if moe is not None and moe.moe_expert_dropout:
        names.append("moe.moe_expert_dropout")
        moe = moe.model_copy(update={"moe_expert_dropout": 0.0})
    return experiment.model_copy(update={"model": model.model_copy(update=off), "moe": moe}), names


def record(trainer: Trainer, steps: int, folder: Path) -> None:
    """Train from the first batch on, and write what `compare` needs into `folder`. Collective over all
    ranks."""
    begin_from(trainer)
    weights = folder / "weights"
    if dist.get_rank() == 0:
        weights.mkdir(parents=True)
    dist.barrier()
    checkpoint.save_weights(weights, trainer.chunks)
    pieces.write(_at(folder, 0, "weights"), pieces.of_weights(trainer.chunks), copies=True)
    records = []

    # Copies of other data-parallel ranks are gathered from the same shards, so that they cannot differ.
    def write_gradients(step: int) -> None:
        pieces.write(_at(folder, step, "gradients"), pieces.of_gradients(trainer.chunks), copies=False)

    def write_weights(step: int, done: Record) -> None:
        records.append({"loss": done["loss"], "grad_norm": done["grad_norm"]})
        pieces.write(_at(folder, step, "weights"), pieces.of_weights(trainer.chunks), copies=False)

    _train(trainer, steps, write_gradients, write_weights)
    if dist.get_rank() == 0:
        (folder / _RECORDS).write_text(json.dumps(records))
    dist.barrier()


def compare(trainer: Trainer, steps: int, folder: Path, tolerance: float | None) -> Report:
    """Train the same steps in this one process, and compare each with what `record` wrote."""
    assert dist.get_world_size() == 1
    checkpoint.load_weights(folder / "weights", trainer.chunks)
    trainer.optimizer.reload_model_params()
    # It has to give this process what it gave the ranks.
    begin_from(trainer)
    recorded: list[Record] = json.loads((folder / _RECORDS).read_text())
    dtype = next(trainer.chunks[0].parameters()).dtype
    allowed = Tolerances.of(dtype, tolerance)
    weights = differences.whole(pieces.of_weights(trainer.chunks))
    at_start = differences.worst(pieces.read(_at(folder, 0, "weights")), weights)
    worst_gradient: list[differences.Worst] = []
    largest: dict[str, Tensor] = {}
    compared: list[Step] = []

    def compare_gradients(step: int) -> None:
        mine = differences.whole(pieces.of_gradients(trainer.chunks))
        for name, gradient in mine.items():
            so_far = largest.get(name, torch.zeros_like(gradient))
            largest[name] = torch.maximum(so_far, gradient.abs())
        worst_gradient.append(differences.worst(pieces.read(_at(folder, step, "gradients")), mine))

    def compare_step(step: int, done: Record) -> None:
        nonlocal weights
        before, weights = weights, differences.whole(pieces.of_weights(trainer.chunks))
        mine = {name: weights[name].float() - before[name].float() for name in weights}
        theirs = differences.changes(
            pieces.read(_at(folder, step - 1, "weights")), pieces.read(_at(folder, step, "weights"))
        )
        # What is rounding, Adam scales up to a step of the learning rate.
        chance = differences.rounding(largest, allowed.first)
        worst_update = differences.worst(theirs, mine, left_out=chance)
        compared.append(Step.of(step, recorded[step - 1], done, worst_gradient[-1], worst_update))

    _train(trainer, steps, compare_gradients, compare_step)
    return Report(dtype, at_start, compared, allowed)


def _train(
    trainer: Trainer,
    steps: int,
    on_gradients: Callable[[int], None],
    on_update: Callable[[int, Record], None],
) -> None:
    """`steps` steps of the training loop itself, with a look at each before and after its update."""
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    with gradients.watched(trainer.chunks, lambda: on_gradients(trainer.iteration + 1)):
        for step in range(1, steps + 1):
            on_update(step, trainer.step(batches))


def _at(folder: Path, step: int, what: str) -> Path:
    return folder / f"step_{step}" / what
