"""Coefficients of losses over the iterations, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_moe.config.schema.moe import AdaptiveCoefficient, ScheduledCoefficient
from megatron_moe.model.moe.coefficients import Coefficient, coefficient


def values(made: Coefficient, rates: list[float | None]) -> list[float]:
    """Before the first iteration and after each."""
    found = [float(made.value)]
    for rate in rates:
        made.end_iteration(rate)
        found.append(float(made.value))
    return found


def test_a_number_stays() -> None:
    assert values(coefficient(0.3), [0.5, 0.1]) == [0.3, 0.3, 0.3]


def test_an_adaptive_one_follows_the_drop_rate() -> None:
    """Skywork-MoE, eqs. 7 to 9, beta 0.9, xi 1/5, at most 0.01: the cap is reached at a rate of 5 %."""
    made = coefficient(AdaptiveCoefficient(initial=0.02, xi=0.2, maximum=0.01, beta=0.9))
    expected = [0.02]
    for target in (0.01, 0.01, 0.004, 0.0):
        expected.append(0.9 * expected[-1] + 0.1 * target)
    assert values(made, [0.5, 0.05, 0.02, 0.0]) == pytest.approx(expected, rel=1e-14)


def test_the_published_constants_settle_where_the_report_says() -> None:
    """Layers that drop less than 1 % settle at 0.0005 to 0.002, from 0.01 at the start."""
    made = coefficient(AdaptiveCoefficient())
    found = values(made, [0.005] * 1000)
    assert found[0] == 0.01 and found[100] == pytest.approx(0.001 + 0.009 * 0.99**100, rel=1e-12)
    assert found[-1] == pytest.approx(0.001, rel=1e-3)


def test_without_a_token_there_is_nothing_to_follow() -> None:
    made = coefficient(AdaptiveCoefficient(initial=0.02))
    assert values(made, [None, None]) == [0.02] * 3


@pytest.mark.parametrize(
    ("style", "quarter"), [("linear", 0.9), ("cosine", 0.8 + 0.2 * math.cos(math.pi / 4))]
)
def test_a_scheduled_one_goes_from_start_to_end_and_stays(style: str, quarter: float) -> None:
    made = coefficient(ScheduledCoefficient(start=1.0, end=0.6, iterations=4, style=style))  # type: ignore[arg-type]
    found = values(made, [0.0] * 6)
    assert found == pytest.approx([1.0, quarter, 0.8, 1.6 - quarter, 0.6, 0.6, 0.6], rel=1e-14)
    assert found[0] == 1.0 and found[4] == 0.6


@pytest.mark.parametrize(
    "setting", [AdaptiveCoefficient(), ScheduledCoefficient(start=1, end=0, iterations=1000)]
)
def test_small_steps_are_kept_when_the_model_is_cast(
    setting: AdaptiveCoefficient | ScheduledCoefficient,
) -> None:
    """Float16Module casts all buffers; from 1 a step of 1e-3 would be lost in bf16."""
    plain, cast = coefficient(setting), torch.nn.Sequential(coefficient(setting)).bfloat16().half()[0]
    assert isinstance(cast, Coefficient)
    assert values(plain, [0.01] * 3) == values(cast, [0.01] * 3)


def test_what_changes_is_saved_and_what_does_not_is_not() -> None:
    assert coefficient(0.3).state_dict() == {}
    for setting in (AdaptiveCoefficient(initial=1), ScheduledCoefficient(start=1, end=0, iterations=7)):
        made, other = coefficient(setting), coefficient(setting)
        values(made, [0.3, 0.4])
        other.load_state_dict(made.state_dict())
        assert float(other.value) == float(made.value) != float(coefficient(setting).value)


@pytest.mark.parametrize("setting", [0.3, AdaptiveCoefficient(initial=0.3)])
def test_a_loss_keeps_its_precision(setting: float | AdaptiveCoefficient) -> None:
    for dtype in (torch.float32, torch.float64):
        weighed = coefficient(setting)(torch.tensor(2.0, dtype=dtype))
        assert weighed.dtype == dtype and weighed.shape == ()
        assert float(weighed) == pytest.approx(0.6, rel=1e-6)
