"""What `verify` found: which differences are too large, as a table and a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_moe.plan.layout import Layout
from megatron_moe.plan.wording import plural
from megatron_moe.training.callback import Record
from megatron_moe.training.verify_differences import FLOOR, Worst


@dataclass(frozen=True)
class Tolerances:
    """The largest relative differences that pass.

    Attributes:
        first: loss, gradient norm and gradients of the first step.
        later: loss and gradient norm of the steps after it.
        drift: updates, and the gradients that follow from them. Adam moves every element by the learning rate
            times about one, also where the gradient is rounding only and its sign is chance.
    """

    first: float
    later: float
    drift: float

    @classmethod
    def of(cls, dtype: torch.dtype, tolerance: float | None) -> Tolerances:
        """From the tolerance that was asked for, or what the precision allows."""
        if dtype == torch.float32:
            first = 1e-5 if tolerance is None else tolerance
            return cls(first, 10 * first, math.sqrt(first))
        # Weights in bf16 move by steps of their own, and tokens near a tie change their expert.
        return cls(5e-2 if tolerance is None else tolerance, math.inf, math.inf)

    def __str__(self) -> str:
        first = f"allowed at step 1: {self.first:.0e}"
        if math.isinf(self.later):
            return f"{first}; all else is only shown. With training.precision=fp32 the check is sharp."
        return (
            f"{first}, updates {self.drift:.0e}; from step 2 on: loss and gradient norm {self.later:.0e}, "
            f"gradients and updates {self.drift:.0e}."
        )


@dataclass(frozen=True)
class Step:
    """One step compared; differences are relative to one process."""

    number: int
    loss: float
    loss_difference: float
    grad_norm: float
    grad_norm_difference: float
    gradients: Worst
    updates: Worst

    @classmethod
    def of(cls, number: int, layout: Record, reference: Record, gradients: Worst, updates: Worst) -> Step:
        """`layout` and `reference` hold loss and grad_norm."""
        loss, grad_norm = (_number(layout[key]) for key in ("loss", "grad_norm"))
        loss_difference = _relative(loss, _number(reference["loss"]))
        norm_difference = _relative(grad_norm, _number(reference["grad_norm"]))
        return cls(number, loss, loss_difference, grad_norm, norm_difference, gradients, updates)

    def failures(self, allowed: Tolerances) -> Iterator[str]:
        """A phrase for each difference that is too large."""
        is_first = self.number == 1
        numbers = allowed.first if is_first else allowed.later
        gradients = allowed.first if is_first else allowed.drift
        for what, difference, most in (
            ("the loss", self.loss_difference, numbers),
            ("the gradient norm", self.grad_norm_difference, numbers),
            (f"the gradient of {_named(self.gradients)}", self.gradients.difference, gradients),
            (f"the update of {_named(self.updates)}", self.updates.difference, allowed.drift),
        ):
            # Not `>`: a loss that is not a number must fail too.
            if not difference <= most:
                yield f"step {self.number}: {what} differs by {difference:.1e}, allowed are {most:.0e}"


@dataclass(frozen=True)
class Report:
    """All that `verify` found.

    Attributes:
        at_start: the weight that differs most before the first step, where no copy may differ at all.
    """

    dtype: torch.dtype
    at_start: Worst
    steps: list[Step]
    allowed: Tolerances

    @property
    def failures(self) -> list[str]:
        """A phrase for each difference that is too large, the earliest first."""
        found = [phrase for step in self.steps for phrase in step.failures(self.allowed)]
        if self.at_start.difference != 0:
            found.insert(0, f"before step 1: {_named(self.at_start)} is not what the ranks saved")
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def later_only(self) -> bool:
        """Whether it fails, but not yet at the first step."""
        first = self.at_start.difference == 0 and not any(self.steps[0].failures(self.allowed))
        return first and not self.passed


def announcement(name: str, layout: Layout, steps: int) -> str:
    """What is going to be compared."""
    ranks = plural(layout.world_size, "rank") + f" ({layout.axes})" if layout.axes else "one rank"
    return f"{name}: {plural(steps, 'step')} on {ranks}, then in one process"


def print_report(report: Report, switched_off: list[str]) -> None:
    """The table, the worst tensors, and what to think of it."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if switched_off:
        console.print(f"Without {' and '.join(switched_off)}: what they draw depends on the layout.")
    Console(highlight=False).print(_table(report))
    console.print("Worst tensors, ||x - x_ref|| / ||x_ref||:")
    for step in report.steps:
        console.print(f"  step {step.number}  gradient  {_shown(step.gradients)}")
        console.print(f"          update    {_shown(step.updates)}")
    console.print(
        f"A tensor with less than {FLOOR:g} of the norm of all is held against that instead of its own norm."
    )
    precision = str(report.dtype).removeprefix("torch.")
    console.print(f"In {precision} {report.allowed}")
    for phrase in report.failures:
        console.print(phrase, style="red")
    if report.passed:
        console.print("PASS: the layout computes what one process computes.", style="bold green")
    else:
        console.print("FAIL: the layout does not compute what one process computes.", style="bold red")
        if report.later_only:
            console.print(
                "Up to there all agrees. A token whose experts' scores are almost equal may go to another\n"
                "one once rounding has moved the weights: --steps 1 leaves that out."
            )


def _table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "loss", "off by", "grad norm", "off by", "gradients", "updates"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in report.steps:
        differences = (step.grad_norm_difference, step.gradients.difference, step.updates.difference)
        table.add_row(
            str(step.number),
            f"{step.loss:.6f}",
            f"{step.loss_difference:.1e}",
            f"{step.grad_norm:.6f}",
            *(f"{difference:.1e}" for difference in differences),
        )
    return table


def _shown(worst: Worst) -> str:
    return _named(worst) if worst.difference else "none, all are equal to the last bit"


def _named(worst: Worst) -> str:
    remarks = [f"rank {worst.rank}"] if worst.rank is not None else []
    remarks += [worst.remark] if worst.remark else []
    return f"{worst.name} ({', '.join(remarks)})" if remarks else worst.name


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _relative(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf
