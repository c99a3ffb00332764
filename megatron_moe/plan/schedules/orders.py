"""What each pipeline rank runs, one pass after the other, under each schedule.

Stage i is chunk i // PP of rank i % PP. 1F1B and interleaved 1F1B run in the order of Megatron-Core's
`forward_backward_pipelining_without_interleaving` and `..._with_interleaving`
(megatron/core/pipeline_parallel/schedules.py), so that as many microbatches are in flight as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

ScheduleName = Literal["1f1b", "interleaved", "gpipe", "zero-bubble"]

Kind = Literal["F", "B", "W"]
"""Forward; backward (where there is a W: only of the activations); gradients of the weights."""


class Op(NamedTuple):
    """One pass of one microbatch through one stage."""

    kind: Kind
    stage: int
    microbatch: int


def order_of(
    name: ScheduleName, rank: int, pipeline_size: int, chunks: int, num_microbatches: int
) -> list[Op]:
    """The passes of one rank in the order in which it runs them.

    Args:
        chunks: stages a rank (VPP). More than one goes with `interleaved` only, and `interleaved` with a
            num_microbatches that PP divides.
    """
    if name == "interleaved":
        return _interleaved(rank, pipeline_size, chunks, num_microbatches)
    assert chunks == 1, f"{name} has one stage a rank"
    if name == "1f1b":
        return _one_forward_one_backward(rank, pipeline_size, num_microbatches)
    if name == "gpipe":
        return _gpipe(rank, num_microbatches)
    return _zero_bubble(rank, pipeline_size, num_microbatches)


def _one_forward_one_backward(rank: int, pipeline_size: int, num_microbatches: int) -> list[Op]:
    forwards = [Op("F", rank, microbatch) for microbatch in range(num_microbatches)]
    backwards = [Op("B", rank, microbatch) for microbatch in range(num_microbatches)]
    return list(_in_turn(forwards, backwards, pipeline_size - 1 - rank))


def _interleaved(rank: int, pipeline_size: int, chunks: int, num_microbatches: int) -> list[Op]:
    """PP microbatches through one chunk after the other, then the next PP; backward, the last chunk first."""
    assert num_microbatches % pipeline_size == 0, "the interleaved schedule runs PP microbatches at a time"
    forwards, backwards = [], []
    for first in range(0, num_microbatches, pipeline_size):
        for chunk in range(chunks):
            for microbatch in range(first, first + pipeline_size):
                forwards.append(Op("F", chunk * pipeline_size + rank, microbatch))
                backwards.append(Op("B", (chunks - 1 - chunk) * pipeline_size + rank, microbatch))
    warmup = 2 * (pipeline_size - 1 - rank) + (chunks - 1) * pipeline_size
    # On one rank Megatron-Core runs no pipeline; all the same, a backward pass waits for its own forward.
    return list(_in_turn(forwards, backwards, warmup))


def _in_turn(forwards: list[Op], backwards: list[Op], warmup: int) -> Iterator[Op]:
    """Some forwards ahead, then one forward and one backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    yield from forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(forwards) - warmup :]


def _gpipe(rank: int, num_microbatches: int) -> list[Op]:
    """All forwards, then all backwards, the last microbatch first (Huang et al. 2019, figure 2)."""
    forwards = [Op("F", rank, microbatch) for microbatch in range(num_microbatches)]
    return forwards + [Op("B", rank, microbatch) for microbatch in reversed(range(num_microbatches))]


def _zero_bubble(rank: int, pipeline_size: int, num_microbatches: int) -> list[Op]:
    """ZB-H1 (Qi et al. 2023, section 2.1): 1F1B, gradients of the weights put off by as many microbatches as
    the rank has fewer in flight than the first one; so each rank keeps PP of them, as the first of 1F1B."""
    order = []
    waiting = 0
    done = 0
    for op in _one_forward_one_backward(rank, pipeline_size, num_microbatches):
        order.append(op)
        if op.kind == "F":
            continue
        waiting += 1
        # Once all forwards have run, a weight gradient fills the time until the next backward arrives.
        if waiting > rank or op.microbatch >= num_microbatches - (pipeline_size - rank):
            order.append(Op("W", rank, done))
            waiting -= 1
            done += 1
    return order + [Op("W", rank, microbatch) for microbatch in range(done, num_microbatches)]
