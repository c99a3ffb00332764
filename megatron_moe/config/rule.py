"""What rules are made of: their form, the names of the parallel sizes, divisibility."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from megatron_moe.config.defaults import divisors_of, nearest_multiples
from megatron_moe.config.origin import Problem
from megatron_moe.config.schema import Experiment

Problems = Iterator[Problem]
Rule = Callable[[Experiment], Problems]
"""Takes an experiment whose derived defaults are filled, and yields what is wrong with it."""

_T = TypeVar("_T")

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
DP = "parallel.data_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
SP = "parallel.sequence_parallel"


def set_value(value: _T | None) -> _T:
    """A value that `defaults.fill` has set: it is None only in an experiment that was not filled."""
    assert value is not None, "rules look at filled experiments only"
    return value


def divides(key: str, value: int, by_key: str, by: int) -> Problems:
    """One problem where `value` at `key` is not divisible by `by` at `by_key`."""
    if value % by:
        advice = f"use {nearest_multiples(value, by)}, or {by_key.rpartition('.')[2]} {divisors_of(value)}"
        yield Problem((key, by_key), f"is not divisible by {by_key}", advice)
