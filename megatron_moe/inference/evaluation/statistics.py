"""Means, ratios and their standard errors; pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Metric(NamedTuple):
    """A number and its standard error; None where a single sample tells of none."""

    value: float
    error: float | None


def mean(values: Sequence[float]) -> Metric:
    """The mean of samples that are drawn independently."""
    count = len(values)
    middle = math.fsum(values) / count
    if count < 2:
        return Metric(middle, None)
    spread = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    return Metric(middle, math.sqrt(spread / count))


def ratio(sums: Sequence[float], sizes: Sequence[float]) -> Metric:
    """sum(sums) / sum(sizes), with the error that samples drawn independently give it (linearised)."""
    count, size = len(sums), math.fsum(sizes)
    value = math.fsum(sums) / size
    if count < 2:
        return Metric(value, None)
    squares = math.fsum((s - value * n) ** 2 for s, n in zip(sums, sizes, strict=True))
    return Metric(value, math.sqrt(squares * count / (count - 1)) / size)


def exponential(metric: Metric) -> Metric:
    """exp of a number; its error to the first order."""
    try:
        value = math.exp(metric.value)
    except OverflowError:
        value = math.inf
    return Metric(value, None if metric.error is None else value * metric.error)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
