"""Numbers as the plan writes them."""

from __future__ import annotations

import pytest

from megatron_moe.plan import wording


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.2e-5, "32.0 us"),
        (0.00999, "9.99 ms"),
        (0.1, "100 ms"),
        (41.25, "41.2 s"),
        (119.0, "119 s"),
        (600.0, "10.0 minutes"),
        (5 * 3600.0, "5.00 hours"),
        (10.9 * 86400, "10.9 days"),
        (2000 * 86400.0, "2,000 days"),
    ],
)
def test_times_have_three_digits_and_the_unit_that_fits(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(15186.4, "15,190"), (717.74, "717.7"), (0.033913, "0.03391"), (0.0, "0")]
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(4.2 * 2**30, "4.20 GiB"), (-(1.7 * 2**20), "-1.70 MiB"), (80 * 2**30, "80.0 GiB")]
)
def test_memory_is_in_binary_units(value: float, text: str) -> None:
    assert wording.memory(value) == text


def test_a_column_has_one_unit_and_as_many_digits_as_its_largest() -> None:
    unit, text = wording.in_one_unit([0.0573, 0.16149, 0.0], wording.SECONDS, digits=4)
    assert unit == "ms"
    assert [text(value) for value in (0.0573, 0.16149, 0.0)] == ["57.3", "161.5", "0.0"]
    assert wording.in_one_unit([], wording.BYTES)[0] == "B"


def test_rounding_up_takes_no_digit_more() -> None:
    assert wording.duration(9.996) == "10.0 s"
