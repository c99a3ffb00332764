"""The growing batch against Megatron-Core's calculator, which counts in floating point."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.schema import Training
from megatron_moe.plan.batch_ramp import global_batch_size, ramp_steps, samples


def training(whole: int, ramp: list[int] | None, train_iters: int = 1000) -> Training:
    return Training(train_iters=train_iters, global_batch_size=whole, seq_length=8, rampup_batch_size=ramp)


def sizes_of_steps(training: Training) -> Iterator[int]:
    consumed_samples = 0
    while True:
        size = global_batch_size(training, consumed_samples)
        yield size
        consumed_samples += size


@pytest.mark.skipif(
    not importlib.metadata.version("megatron-core").startswith("0.16"),
    reason="0.19 has its calculator no more",
)
@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 8),
    increments=st.integers(1, 12),
    distance=st.integers(1, 300),
    consumed=st.integers(0, 5000),
)
def test_as_megatron_core(start: int, increment: int, increments: int, distance: int, consumed: int) -> None:
    """Where the increments lie whole numbers of samples apart, so that rounding has no say."""
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    whole, samples = start + increments * increment, increments * distance
    theirs = RampupBatchsizeNumMicroBatchesCalculator(whole, 1, 1, False, 1, start, increment, samples)
    theirs.update(consumed, consistency_check=True)
    assert global_batch_size(training(whole, [start, increment, samples]), consumed) == (
        theirs.get_current_global_batch_size()
    )


def test_sizes_of_the_steps() -> None:
    """2 -> 8 by 2 over 10 samples: an increment each 10 / 3 samples."""
    growing = training(8, [2, 2, 10])
    # Consumed before each step: 0, 2, 4, 8, 14.
    assert list(islice(sizes_of_steps(growing), 6)) == [2, 2, 4, 6, 8, 8]
    assert ramp_steps(growing) == 4
    assert ramp_steps(training(8, None)) == 0
    assert list(islice(sizes_of_steps(training(8, None)), 2)) == [8, 8]


def test_exact_where_a_third_is_not() -> None:
    """49 increments over 49 x 7 - 1 samples: the last comes with the last sample, and not before."""
    growing = training(50, [1, 1, 342])
    assert global_batch_size(growing, 341) == 49
    assert global_batch_size(growing, 342) == 50


@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 8),
    increments=st.integers(1, 12),
    samples=st.integers(1, 3000),
)
def test_steps_counted_at_once_are_those_counted_one_by_one(
    start: int, increment: int, increments: int, samples: int
) -> None:
    whole = start + increments * increment
    sizes = sizes_of_steps(training(whole, [start, increment, samples]))
    one_by_one = next(step for step in count() if next(sizes) == whole)
    assert ramp_steps(training(whole, [start, increment, samples], one_by_one + 1)) == one_by_one
    assert ramp_steps(training(whole, [start, increment, samples], one_by_one)) is None


@given(
    start=st.integers(1, 8),
    increments=st.integers(1, 12),
    ramp=st.integers(1, 3000),
    steps=st.integers(1, 400),
)
def test_samples_of_a_run_are_those_of_its_steps(start: int, increments: int, ramp: int, steps: int) -> None:
    growing = training(start + increments, [start, 1, ramp], steps)
    assert samples(growing) == sum(islice(sizes_of_steps(growing), steps))


def test_a_ramp_of_tokens_instead_of_samples_is_no_reason_to_wait() -> None:
    assert ramp_steps(training(8, [2, 2, 300_000_000_000])) is None
