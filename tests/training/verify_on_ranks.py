"""The two parts of `verify` for the ranks of tests/distributed.py, and faults to plant into the first one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_moe.config.schema import Experiment
from megatron_moe.plan import plan
from megatron_moe.training import verify
from megatron_moe.training.build import start
from megatron_moe.training.trainer import Trainer
from megatron_moe.training.verify_report import Report

Fault = Callable[[Trainer], None]


def layout_part(experiment: Experiment, steps: int, folder: Path, fault: Fault | None = None) -> None:
    """Record under the experiment's layout, with a fault in the trainer if one is given."""
    trainer = start(experiment, plan.make(experiment), folder)
    if fault is not None:
        fault(trainer)
    verify.record(trainer, steps, folder)


def reference_part(experiment: Experiment, steps: int, folder: Path, tolerance: float | None) -> Report:
    """Compare with one process."""
    trainer = start(experiment, plan.make(experiment), folder)
    return verify.compare(trainer, steps, folder, tolerance)
