"""Run on ranks: the same steps with and without an option of the engine, and how far they are apart."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from train_on_ranks import begin
from training_runs import TIMES

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import gradients, groups, overlap, pieces
from megatron_moe.training.callback import Record
from megatron_moe.training.trainer import Trainer


@dataclass
class Seen:
    """What a rank saw of some steps."""

    records: list[Record] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    buckets: int = 0


@dataclass
class Apart:
    """Largest differences, relative to the larger norm, over all steps."""

    loss: float
    grad_norm: float
    gradients: float
    weights: float
    held_out: float
    buckets: int
    """Of gradients, in the second of the two."""
    metrics: tuple[str, ...] = ()
    """Keys of the records that are not the same, those of time left out."""


def compare(
    first: Experiment, second: Experiment, folder: Path, steps: int, bucket_size: int | None = None
) -> Apart:
    """Train under both experiments. `bucket_size`: numbers a bucket of gradients where they are reduced
    bucket by bucket."""
    a = watch(first, folder / "first", steps, bucket_size)
    groups.destroy()
    b = watch(second, folder / "second", steps, bucket_size)
    return Apart(
        loss=max(_numbers(x["loss"], y["loss"]) for x, y in zip(a.records, b.records, strict=True)),
        grad_norm=max(
            _numbers(x["grad_norm"], y["grad_norm"]) for x, y in zip(a.records, b.records, strict=True)
        ),
        gradients=max(_tensors(x, y) for x, y in zip(a.gradients, b.gradients, strict=True)),
        weights=max(_tensors(x, y) for x, y in zip(a.weights, b.weights, strict=True)),
        held_out=max(_numbers(x, y) for x, y in zip(a.held_out, b.held_out, strict=True)),
        buckets=b.buckets,
        metrics=tuple(
            key
            for x, y in zip(a.records, b.records, strict=True)
            for key in x
            if key not in TIMES and x[key] != y[key]
        ),
    )


def watch(experiment: Experiment, folder: Path, steps: int, bucket_size: int | None = None) -> Seen:
    """Steps, each followed by an evaluation and a look at the weights, in turns before and after it."""
    trainer = _begin(experiment, folder, bucket_size)
    seen = Seen(buckets=sum(len(chunk.bucket_groups) for chunk in trainer.chunks))
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    held_out = trainer.datasets.valid
    assert held_out is not None

    def look() -> None:
        seen.gradients.append(_named(pieces.of_gradients(trainer.chunks)))

    with gradients.watched(trainer.chunks, look):
        for step in range(steps):
            seen.records.append(trainer.step(batches))
            if step % 2:
                seen.held_out.append(trainer.evaluate(held_out, 1)["eval/loss"])
            seen.weights.append(_named(pieces.of_weights(trainer.chunks)))
            if not step % 2:
                seen.held_out.append(trainer.evaluate(held_out, 1)["eval/loss"])
    return seen


def overlapped(experiment: Experiment, folder: Path, bucket_size: int) -> tuple[int, int, bool]:
    """In the second step, whose first one has shown in which order gradients come: the reductions that
    started before the schedule waited for them, and the buckets of gradients; and whether the update left
    weights on this rank that were not the newest."""
    from megatron.core.utils import get_model_config

    trainer = _begin(experiment, folder, bucket_size)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    trainer.step(batches)
    (chunk,) = trainer.chunks
    config, groups_of_buckets = (
        get_model_config(chunk),
        [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups],
    )
    finalize, started = config.finalize_model_grads_func, []

    def look(*args: object, **kwargs: object) -> None:
        started.extend(group for group in groups_of_buckets if group.grad_reduce_handle is not None)
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = look
    trainer.step(batches)
    after_update = [weight.detach().clone() for weight in chunk.parameters()]
    overlap.complete_weights(trainer.chunks)
    stale = any(not torch.equal(a, b) for a, b in zip(after_update, chunk.parameters(), strict=True))
    return len(started), len(groups_of_buckets), stale


def _begin(experiment: Experiment, folder: Path, bucket_size: int | None) -> Trainer:
    from megatron.core import distributed

    config = functools.partial(distributed.DistributedDataParallelConfig, bucket_size=bucket_size)
    with mock.patch.object(distributed, "DistributedDataParallelConfig", config):
        return begin(experiment, folder)


def _named(found: object) -> dict[str, Tensor]:
    return {f"{piece.name} {piece.start}": piece.data.clone() for piece in found}  # type: ignore[attr-defined]


def _numbers(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(
        float(torch.linalg.vector_norm(a[name].double() - b[name].double()))
        / max(float(torch.linalg.vector_norm(a[name].double())), 1e-30)
        for name in a
    )
