"""The makespans of many placements under one schedule at once, with numpy, and bounds of them where only the
first stages are known.

The same recurrence as in `simulation`, of which a test holds the two together; each number there is a row of
numbers here, one for each placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from megatron_moe.plan.schedules.orders import Kind, Op, ScheduleName, order_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Seconds = NDArray[np.float64]


_REMEMBERED = 10_000
"""Forward passes of schedules whose orders are remembered: a few megabytes each."""


@dataclass(frozen=True)
class Rest:
    """What is known of the stages behind the known ones, in each placement: bounds from below.

    Attributes:
        own: the makespan of these stages as a pipeline of their own.
        through: seconds from the first pass of a microbatch there to the last: forwards, backwards and the
            transfers between; transfers to and from the known stages are in none of these numbers.
        stay: the slowest stage's forward or backward.
        cycle: the slowest cycle of passes, a microbatch: a stage's forward and backward, or those of
            neighbours with the transfers between, over the number of them.
        walks: [w, placements]: entry w - 1 is the longest path of w forwards and backwards that begins with
            the first stage's forward and ends with its backward, while all ranks run both in turn.
    """

    own: Seconds
    through: Seconds
    stay: Seconds
    cycle: Seconds
    walks: Seconds


def makespans(
    name: ScheduleName,
    forward_s: Seconds,
    backward_s: Seconds,
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float,
) -> Seconds:
    """Seconds from the first to the last pass: [placements].

    Args:
        forward_s, backward_s: of each stage: [stages, placements].
    """
    if pipeline_size == 1:
        total: Seconds = num_microbatches * (forward_s + backward_s).sum(axis=0)
        return total
    if name == "1f1b":
        return bounds(forward_s, backward_s, pipeline_size, num_microbatches, transfer_s, None)
    return _any_order(name, forward_s, backward_s, pipeline_size, num_microbatches, transfer_s, None)


def bounds(
    forward_s: Seconds,
    backward_s: Seconds,
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float,
    rest: Rest | None,
) -> Seconds:
    """The makespan of 1F1B, or a bound from below where only the first stages are given and a `rest`."""
    import numpy as np

    if num_microbatches < pipeline_size:
        spans = _any_order("1f1b", forward_s, backward_s, pipeline_size, num_microbatches, transfer_s, rest)
    else:
        spans = _in_step(forward_s, backward_s, pipeline_size, num_microbatches, transfer_s, rest)
    if rest is not None:
        before = (forward_s + backward_s + 2 * transfer_s).sum(axis=0)
        np.maximum(spans, before + rest.own, out=spans)
    return spans


def _in_step(
    forward_s: Seconds,
    backward_s: Seconds,
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float,
    rest: Rest | None,
) -> Seconds:
    """1F1B, all ranks in step: at step t rank i runs forward (t - i) / 2, or backward (t + i + 1) / 2 - PP.

    Then whatever a pass waits for ran one step before, on its rank or a neighbour: with two sets of ranks,
    even and odd ones, a step is one operation each. Before its first backward, and after its last forward, a
    rank runs one kind only; there the longest path has a closed form: through each stage once, and on the
    slowest of them for all other microbatches.
    """
    import numpy as np

    num_ranks, width = forward_s.shape
    last = num_ranks - 1
    hops = transfer_s * np.arange(num_ranks)[:, None]
    others = np.arange(pipeline_size - 1, pipeline_size - 1 - num_ranks, -1)[:, None]
    slowest_forward = np.maximum.accumulate(forward_s, axis=0)
    slowest_backward = np.maximum.accumulate(backward_s, axis=0)
    into = np.cumsum(forward_s, axis=0) + hops
    out_of = np.cumsum(backward_s, axis=0) + hops
    first_step = 2 * pipeline_size - 2 - last
    starts = into + others * slowest_forward
    finishes = out_of + others * slowest_backward - backward_s
    beyond = None
    if rest is not None:
        beyond = _Beyond(rest, pipeline_size, num_microbatches, num_ranks, transfer_s)
        beyond.warm_up(into[last], slowest_forward[last])
    # Rank i stands in row i + 1, so that there is a row before the first and one behind the last.
    ended = np.full((num_ranks + 2, width), -np.inf)
    heard = np.empty((num_ranks, width))
    longest = np.full(width, -np.inf)
    for step in range(first_step, 2 * num_microbatches + last):
        forward, backward = step % 2, 1 - step % 2
        heard[forward::2] = ended[forward:num_ranks:2]
        heard[backward::2] = ended[backward + 2 :: 2]
        heard += transfer_s
        if beyond is not None and (step - last) % 2:
            beyond.answer((step + last + 1) // 2 - pipeline_size, heard[last])
        np.maximum(heard, ended[1:-1], out=ended[1:-1])
        ended[1 + forward : -1 : 2] += forward_s[forward::2]
        ended[1 + backward : -1 : 2] += backward_s[backward::2]
        starting = 2 * pipeline_size - 2 - step
        if starting >= 0:
            np.maximum(ended[1 + starting], starts[starting], out=ended[1 + starting])
        if beyond is not None and not (step - last) % 2:
            beyond.hear((step - last) // 2, ended[1 + last])
        finishing = step - (2 * num_microbatches - 1)
        if finishing >= 0:
            np.maximum(longest, ended[1 + finishing] + finishes[finishing], out=longest)
    if beyond is not None:
        np.maximum(longest, beyond.cool_down(out_of[last], slowest_backward[last]), out=longest)
    return longest


class _Beyond:
    """The stages behind the last known rank, as it sees them: when a gradient can be back at the earliest.

    Counted from the last known rank: P - s = `depth` stages are unknown. While all ranks run forward and
    backward in turn, a path of w of their forwards and as many backwards leads from forward k to backward
    k + w - depth.
    """

    def __init__(
        self, rest: Rest, pipeline_size: int, num_microbatches: int, num_ranks: int, transfer_s: float
    ) -> None:
        import numpy as np

        self.depth = pipeline_size - num_ranks
        self.num_microbatches = num_microbatches
        self.through = rest.through + 2 * transfer_s
        self.stay = rest.stay
        self.cycle = rest.cycle
        # A cycle of w stages runs a multiple of w times; what is left runs on the slowest of them, which is
        # slower than the cycle's mean without its transfers.
        self.slack = 2 * transfer_s * max(0, self.depth - 1)
        self.walks = rest.walks[::-1] + 2 * transfer_s
        self.sent = np.full((num_microbatches, rest.through.shape[0]), -np.inf)
        self.staying = np.full(rest.through.shape[0], -np.inf)
        self.cycling = np.full(rest.through.shape[0], -np.inf)

    def warm_up(self, first: Seconds, slowest: Seconds) -> None:
        """The forwards before those of `_in_step`; the first ends at `first`."""
        for microbatch in range(self.depth):
            self.sent[microbatch] = first + microbatch * slowest

    def hear(self, microbatch: int, ended: Seconds) -> None:
        """A forward of the last known rank ended."""
        if microbatch < self.num_microbatches:
            self.sent[microbatch] = ended

    def answer(self, microbatch: int, heard: Seconds) -> None:
        """Raise `heard` to when the gradient of the next microbatch, from 0, can arrive at the earliest."""
        import numpy as np

        np.maximum(heard, self._back(microbatch), out=heard)
        # Before and behind that, the unknown ranks do not run forward and backward in turn.
        first, behind = self.depth - 1, microbatch + self.depth
        if behind > self.num_microbatches:
            return
        earliest = max(first, behind - len(self.walks))
        paths = self.sent[earliest:behind] + self.walks[len(self.walks) - (behind - earliest) :]
        np.maximum(heard, paths.max(axis=0), out=heard)
        np.maximum(heard, self.cycling + self.cycle + self.through - self.slack, out=heard)
        if microbatch >= first:
            self.cycling = np.maximum(self.cycling + self.cycle, self.sent[microbatch])

    def _back(self, microbatch: int) -> Seconds:
        """Through all stages, at once, or after others through the slowest."""
        import numpy as np

        self.staying = np.maximum(self.staying + self.stay, self.sent[microbatch] + self.through)
        return self.staying

    def cool_down(self, out: Seconds, slowest: Seconds) -> Seconds:
        """The longest path through one of the backwards behind those of `_in_step`."""
        import numpy as np

        longest = np.full(len(out), -np.inf)
        for microbatch in range(self.num_microbatches - self.depth, self.num_microbatches):
            after = out + (self.num_microbatches - 1 - microbatch) * slowest
            np.maximum(longest, self._back(microbatch) + after, out=longest)
        return longest


def _orders(
    name: ScheduleName, known_ranks: int, pipeline_size: int, chunks: int, num_microbatches: int
) -> list[list[Op]]:
    """What each of the first ranks runs."""
    return [order_of(name, rank, pipeline_size, chunks, num_microbatches) for rank in range(known_ranks)]


_known_orders = lru_cache(maxsize=32)(_orders)


def _any_order(
    name: ScheduleName,
    forward_s: Seconds,
    backward_s: Seconds,
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float,
    rest: Rest | None,
) -> Seconds:
    """Pass by pass. With a `rest` the stages are those of the first ranks, one each."""
    import numpy as np

    num_stages, width = forward_s.shape
    known_ranks = pipeline_size if rest is None else num_stages
    seconds: dict[Kind, Seconds] = {"F": forward_s, "B": backward_s}
    chunks = num_stages // known_ranks
    is_short = num_stages * num_microbatches <= _REMEMBERED
    orders = (_known_orders if is_short else _orders)(
        name, known_ranks, pipeline_size, chunks, num_microbatches
    )
    following = [0] * known_ranks
    free = np.zeros((known_ranks, width))
    arrived: dict[tuple[Kind, int, int], Seconds] = {}
    asleep: dict[tuple[Kind, int, int], int] = {}
    awake = list(range(known_ranks))
    beyond = None
    if rest is not None:
        beyond = _Beyond(rest, pipeline_size, num_microbatches, known_ranks, transfer_s)
    while awake:
        rank = awake.pop()
        order = orders[rank]
        while following[rank] < len(order):
            kind, stage, microbatch = order[following[rank]]
            is_end = stage == num_stages - 1
            if (kind == "F" and stage) or (kind == "B" and not is_end):
                arrival = arrived.pop((kind, stage, microbatch), None)
                if arrival is None:
                    asleep[kind, stage, microbatch] = rank
                    break
                np.maximum(free[rank], arrival, out=free[rank])
            if kind == "B" and is_end and beyond is not None:
                beyond.answer(microbatch, free[rank])
            free[rank] += seconds[kind][stage]
            if kind == "F" and is_end and beyond is not None:
                beyond.hear(microbatch, free[rank])
            following[rank] += 1
            receiver: tuple[Kind, int, int] = (kind, stage + 1 if kind == "F" else stage - 1, microbatch)
            arrived[receiver] = free[rank] + transfer_s
            if receiver in asleep:
                awake.append(asleep.pop(receiver))
    longest: Seconds = free.max(axis=0)
    return longest
