"""Which source a sample comes from: against the greedy form of the same method, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.order import Interleaving

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def greedily(weights: list[int], count: int) -> list[int]:
    """Sainte-Lague: each seat goes to the largest w / (2 taken + 1), the first one of equals."""
    taken, order = [0] * len(weights), []
    for _ in range(count):
        quotients = [Fraction(weight, 2 * seats + 1) for weight, seats in zip(weights, taken, strict=True)]
        order.append(quotients.index(max(quotients)))
        taken[order[-1]] += 1
    return order


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [1, 2, 5], [100, 1, 27], [2, 2, 2, 1, 1]])
def test_the_sources_of_the_greedy_method_come_in_turn(weights: list[int]) -> None:
    total = 1 << sum(weights).bit_length()
    padded = [
        *weights,
        total - sum(weights),
    ]  # in these shares floating point is exact, also where two are due
    interleaving = Interleaving([float(weight) for weight in padded])
    assert [interleaving[index][0] for index in range(3000)] == greedily(padded, 3000)


@given(weights=WEIGHTS, length=st.integers(1, 2500))
def test_every_beginning_is_in_proportion(weights: list[float], length: int) -> None:
    interleaving = Interleaving(weights)
    counts, total = [0] * len(weights), sum(weights)
    for index in range(length):
        source, place = interleaving[index]
        assert place == counts[source], "a source's samples come in its order, none left out"
        counts[source] += 1
    for count, weight in zip(counts, weights, strict=True):
        share = weight / total
        assert abs(count - share * length) <= (1 + share * len(weights)) / 2 + 1e-6
    assert interleaving.taken(length) == counts


@given(weights=WEIGHTS, begin=st.integers(0, 10**12), data=st.data())
def test_any_sample_can_be_asked_for_at_once(weights: list[float], begin: int, data: st.DataObject) -> None:
    """A run that goes on in the middle, far inside, takes the same samples as one that came there."""
    walked = Interleaving(weights)
    counts = walked.taken(begin)
    assert sum(counts) == begin
    for index in range(begin, begin + 1100):
        source, place = walked[index]
        assert place == counts[source]
        counts[source] += 1
    asked = data.draw(st.integers(begin, begin + 1099))
    assert Interleaving(weights)[asked] == walked[asked]
    assert walked.taken(begin + 1100) == counts


def test_a_source_without_weight_never_comes() -> None:
    interleaving = Interleaving([0.0, 3.0, 0.0, 1.0])
    assert {interleaving[index][0] for index in range(5000)} == {1, 3}
    assert interleaving.taken(4000) == [0, 3000, 0, 1000]


def test_a_rare_source_comes_when_it_is_due() -> None:
    """No window is so short that a small weight is lost in it."""
    interleaving = Interleaving([1.0, 1e-6])
    rare = [interleaving.taken(millions * 10**6)[1] for millions in (1, 2, 10, 1000)]
    assert rare == [pytest.approx(expected, abs=1) for expected in (1, 2, 10, 1000)]
