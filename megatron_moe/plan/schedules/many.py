"""The makespans of many placements under one schedule at once, with numpy.

The same recurrence as in `simulation`, of which a test holds the two together; each number there is a row of
numbers here, one for each placement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe.plan.schedules.orders import Kind, ScheduleName, order_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Seconds = NDArray[np.float64]


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
    if name == "1f1b" and num_microbatches >= pipeline_size:
        return _one_forward_one_backward(forward_s, backward_s, num_microbatches, transfer_s)
    return _any_order(name, forward_s, backward_s, pipeline_size, num_microbatches, transfer_s)


def _one_forward_one_backward(
    forward_s: Seconds, backward_s: Seconds, num_microbatches: int, transfer_s: float
) -> Seconds:
    """1F1B, all ranks in step: at step t rank i runs forward (t - i) / 2, or backward (t + i + 1) / 2 - PP.

    Then whatever a pass waits for ran one step before, on its rank or a neighbour: with two rows of ranks, even
    and odd ones, a step is one operation each. Before its first backward, and after its last forward, a rank
    runs one kind only; there the longest path has a closed form.
    """
    import numpy as np

    num_ranks, width = forward_s.shape
    stays = np.arange(num_ranks - 1, -1, -1)[:, None]
    hops = transfer_s * np.arange(num_ranks)[:, None]
    # Until forward PP - 1 - i of rank i, a path through F_0 .. F_i stays on the slowest of them.
    until = np.cumsum(forward_s, axis=0) + hops + stays * np.maximum.accumulate(forward_s, axis=0)
    # After the backward that follows rank i's last forward, the same through B_i .. B_0.
    beyond = np.cumsum(backward_s, axis=0) + hops + stays * np.maximum.accumulate(backward_s, axis=0)
    beyond -= backward_s
    ended = np.full((num_ranks + 2, width), -np.inf)
    heard = np.empty((num_ranks, width))
    longest = np.full(width, -np.inf)
    for step in range(num_ranks - 1, 2 * num_microbatches + num_ranks - 1):
        even = slice(step % 2, num_ranks, 2)
        odd = slice(1 - step % 2, num_ranks, 2)
        # Rank i stands in row i + 1, so that the row before the first rank and that behind the last are empty.
        heard[even] = ended[even.start : num_ranks : 2]
        heard[odd] = ended[odd.start + 2 : num_ranks + 2 : 2]
        heard += transfer_s
        np.maximum(heard, ended[1:-1], out=ended[1:-1])
        ended[1 + even.start : num_ranks + 1 : 2] += forward_s[even]
        ended[1 + odd.start : num_ranks + 1 : 2] += backward_s[odd]
        starting = 2 * num_ranks - 2 - step
        if starting >= 0:
            np.maximum(ended[1 + starting], until[starting], out=ended[1 + starting])
        ending = step - (2 * num_microbatches - 1)
        if ending >= 0:
            np.maximum(longest, ended[1 + ending] + beyond[ending], out=longest)
    return longest


def _any_order(
    name: ScheduleName,
    forward_s: Seconds,
    backward_s: Seconds,
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float,
) -> Seconds:
    """Pass by pass."""
    import numpy as np

    num_stages, width = forward_s.shape
    seconds: dict[Kind, Seconds] = {"F": forward_s, "B": backward_s}
    chunks = num_stages // pipeline_size
    orders = [
        iter(order_of(name, rank, pipeline_size, chunks, num_microbatches)) for rank in range(pipeline_size)
    ]
    following = [next(order) for order in orders]
    free = np.zeros((pipeline_size, width))
    arrived: dict[tuple[Kind, int, int], Seconds] = {}
    asleep: dict[tuple[Kind, int, int], int] = {}
    awake = list(range(pipeline_size))
    while awake:
        rank = awake.pop()
        while True:
            kind, stage, microbatch = following[rank]
            if (kind == "F" and stage) or (kind == "B" and stage < num_stages - 1):
                arrival = arrived.pop((kind, stage, microbatch), None)
                if arrival is None:
                    asleep[kind, stage, microbatch] = rank
                    break
                np.maximum(free[rank], arrival, out=free[rank])
            free[rank] += seconds[kind][stage]
            receiver = (kind, stage + 1 if kind == "F" else stage - 1, microbatch)
            arrived[receiver] = free[rank] + transfer_s
            if receiver in asleep:
                awake.append(asleep.pop(receiver))
            try:
                following[rank] = next(orders[rank])
            except StopIteration:
                break
    longest: Seconds = free.max(axis=0)
    return longest
