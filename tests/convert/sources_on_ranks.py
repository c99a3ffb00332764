"""The first step of a run that starts from a model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.plan import plan
from megatron_moe.training.build import start
from megatron_moe.training.starting import begin_from


def first_loss(experiment: Experiment, run: Path) -> tuple[float, Tensor, Tensor]:
    """Of the first step, and the tokens and labels [b, s] of its one microbatch."""
    run.mkdir(exist_ok=True)
    trainer = start(experiment, plan.make(experiment), run)
    begin_from(trainer)
    batch = next(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    record = trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    return float(record["loss"]), batch["tokens"], batch["labels"]
