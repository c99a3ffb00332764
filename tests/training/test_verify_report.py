"""What passes, what fails, and what the user reads."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_moe.training.verify_differences import Worst
from megatron_moe.training.verify_report import Report, Step, Tolerances, print_report

SAME = Worst(0.0, "embedding.word_embeddings.weight", None)
EXPERT = "decoder.layers.3.mlp.experts.experts.linear_fc2.weight[expert 5]"
NUMBERS = {"loss": 2.0, "grad_norm": 4.0}


def report(
    *steps: Step, dtype: torch.dtype = torch.float32, start: Worst = SAME, tolerance: float | None = None
) -> Report:
    return Report(dtype, start, list(steps), Tolerances.of(dtype, tolerance))


def step(
    number: int = 1,
    loss: float | None = 2.0,
    grad_norm: float = 4.0,
    gradients: float = 0.0,
    updates: float = 0.0,
) -> Step:
    """One process has a loss of 2 and a gradient norm of 4."""
    layout = {"loss": loss, "grad_norm": grad_norm}
    return Step.of(number, layout, NUMBERS, Worst(gradients, EXPERT, 1), Worst(updates, EXPERT, 1))


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ({"loss": 2.0 * (1 + 5e-6)}, {"loss": 2.0 * (1 - 2e-5)}, "the loss"),
        ({"grad_norm": 4.0 * (1 + 5e-6)}, {"grad_norm": 4.0 * (1 + 2e-5)}, "the gradient norm"),
        ({"gradients": 5e-6}, {"gradients": 2e-5}, f"the gradient of {EXPERT} (rank 1)"),
        ({"updates": 2e-3}, {"updates": 5e-3}, f"the update of {EXPERT} (rank 1)"),
    ],
)
def test_first_step_of_fp32_is_held_against_1e_5(
    good: dict[str, float], bad: dict[str, float], says: str
) -> None:
    assert report(step(**good)).passed
    (failure,) = report(step(**bad)).failures
    assert failure.startswith(f"step 1: {says} differs by ")


def test_later_steps_may_drift_but_not_far() -> None:
    assert report(step(), step(2, loss=2.0 * (1 + 5e-5), gradients=1e-3, updates=1e-3)).passed
    assert not report(step(), step(2, loss=2.0 * (1 + 5e-4))).passed
    assert not report(step(), step(2, gradients=1e-2)).passed


def test_a_wider_tolerance_can_be_asked_for() -> None:
    assert report(step(gradients=1e-4), tolerance=1e-3).passed


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_loss_that_is_not_a_number_fails(loss: float | None) -> None:
    assert not report(step(loss=loss)).passed
    assert not report(step(), step(2, loss=loss)).passed


def test_weights_that_differ_at_the_start_fail() -> None:
    assert not report(step(), start=Worst(1e-9, EXPERT, 1)).passed


def test_the_user_reads_the_numbers_the_worst_tensor_and_the_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(report(step(gradients=0.25)), ["model.hidden_dropout"])
    text = capsys.readouterr().out
    for part in ("2.5e-01", EXPERT, "rank 1", "1e-05", "FAIL", "Without model.hidden_dropout"):
        assert part in text
    print_report(report(step()), [])
    text = capsys.readouterr().out
    assert "PASS" in text and "FAIL" not in text and "Without" not in text
