"""Iterations with any number of microbatches: of a long one, the beginning and the end are simulated.

Between filling and draining the pipeline, each pass waits for passes of the last few microbatches only, the
same way for each. So once the times of those have repeated, shifted by the same seconds on all
ranks, they repeat for ever (a recurrence of maxima and sums; Baccelli et al. 1992, chapter 3): what lies
between the beginning and the end is as many periods. A period is one microbatch, where a rank is the slowest;
a few where transfers to neighbours are what is waited for; of an interleaved schedule, PP times as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from megatron_moe.plan.schedules.orders import ScheduleName
from megatron_moe.plan.schedules.simulation import StageTimes, simulate_whole
from megatron_moe.plan.schedules.timeline import Extent, LeftOut, Timeline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIMULATED_WHOLE = 2048
"""Microbatches up to which every pass is simulated."""
_FEWEST = 1024
_A_RANK = 20
"""Of a longer iteration, at least so many are, and at least so many for each rank."""
_MORE = 8
"""So many times as many where those do not repeat."""
_PASSES = 400_000
"""But no more passes than that: about a second."""
_MARGIN = 4
"""Times PP: microbatches that a pass may reach back to, or that are in flight; of all schedules."""
_LONGEST_PERIOD = 64
"""Times the microbatches that the schedule runs in turn."""
_SAME = 1e-10
"""Of a period: differences below are rounding."""


class _Period(NamedTuple):
    """What repeats."""

    microbatches: int
    seconds: float


def simulate(
    name: ScheduleName,
    stages: Sequence[StageTimes],
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float = 0.0,
) -> Timeline:
    """One iteration as `simulate_whole`'s; of more than `SIMULATED_WHOLE` microbatches the beginning and the
    end, at the times at which they are in the whole iteration.

    Where nothing repeats in what is simulated, because two ranks are nearly as slow, the rest is counted at
    the pace of the slowest: too short by a pipeline's filling at most.

    Args:
        name: any but `gpipe`, whose passes do not take turns (`extent` knows it).
    """
    if num_microbatches <= SIMULATED_WHOLE:
        return simulate_whole(name, stages, pipeline_size, num_microbatches, transfer_s)
    assert name != "gpipe", "its forwards all come before its backwards"
    in_turn = pipeline_size if name == "interleaved" else 1
    count = _beginning(pipeline_size, in_turn)
    begun = simulate_whole(name, stages, pipeline_size, count, transfer_s)
    period = _period(begun, pipeline_size, count, in_turn)
    if period is None and (more := min(_MORE * count, _PASSES // (2 * len(stages)))) > count:
        count = more // in_turn * in_turn
        if count >= num_microbatches:
            return simulate_whole(name, stages, pipeline_size, num_microbatches, transfer_s)
        begun = simulate_whole(name, stages, pipeline_size, count, transfer_s)
        period = _period(begun, pipeline_size, count, in_turn)
    if period is None:
        period = _Period(in_turn, in_turn * _pace(begun, pipeline_size, count))
    fewer = (count - num_microbatches) % period.microbatches
    if fewer:
        count -= fewer
        begun = simulate_whole(name, stages, pipeline_size, count, transfer_s)
    return _extended(begun, stages, pipeline_size, count, num_microbatches, period)


def extent(
    name: ScheduleName,
    stages: Sequence[StageTimes],
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float = 0.0,
) -> Extent:
    """One iteration of any schedule as a whole."""
    if name != "gpipe" or num_microbatches <= SIMULATED_WHOLE:
        whole = simulate_whole if name == "gpipe" else simulate
        return whole(name, stages, pipeline_size, num_microbatches, transfer_s)
    # The last stage has all forwards behind it before any backward of another one starts, so that each half
    # is a line of machines: one more microbatch takes the time of the slowest.
    one = simulate_whole(name, stages, pipeline_size, 1, transfer_s)
    others = num_microbatches - 1
    slowest_s = max(stage.forward_s for stage in stages) + max(stage.backward_s for stage in stages)
    makespan_s = one.makespan_s + others * slowest_s
    return Extent(
        makespan_s=makespan_s,
        idle_s=_idle_s(stages, pipeline_size, num_microbatches, makespan_s),
        peak_in_flight=tuple(num_microbatches * count for count in one.peak_in_flight),
        peak_kept_bytes=tuple(num_microbatches * kept for kept in one.peak_kept_bytes),
        transfer_s=tuple(num_microbatches * seconds for seconds in one.transfer_s),
    )


def _beginning(pipeline_size: int, in_turn: int) -> int:
    """How many microbatches are simulated first."""
    count = max(_FEWEST, _A_RANK * pipeline_size)
    return -(-count // in_turn) * in_turn


def _ends(begun: Timeline, count: int, in_turn: int) -> NDArray[np.float64]:
    """When passes end: [turns, passes of a turn]."""
    import numpy as np

    microbatches = np.array(begun.microbatches)
    kinds = np.array([" FBW".index(kind) for kind in begun.kinds])
    stages, ends = np.array(begun.stages), np.array(begun.ends_s)
    order = np.lexsort((kinds, stages, microbatches))
    return ends[order].reshape(count // in_turn, -1)


def _period(begun: Timeline, pipeline_size: int, count: int, in_turn: int) -> _Period | None:
    """What repeats in the times of all passes before the pipeline drains."""
    import numpy as np

    ends = _ends(begun, count, in_turn)
    margin = _MARGIN * pipeline_size // in_turn
    behind = len(ends) - margin
    longest = min(_LONGEST_PERIOD, behind - 2 * margin)
    for turns in range(1, longest + 1):
        last = behind - turns
        differences = ends[last - margin : last] - ends[last - margin - turns : last - turns]
        seconds = float(differences.mean())
        if np.ptp(differences) <= _SAME * seconds:
            return _Period(turns * in_turn, seconds)
    return None


def _pace(begun: Timeline, pipeline_size: int, count: int) -> float:
    """Seconds of a microbatch on the rank that gets slower than the others."""
    ends = _ends(begun, count, 1)
    last = count - _MARGIN * pipeline_size
    first = last // 2
    return float((ends[last] - ends[first]).max()) / (last - first)


def _extended(
    begun: Timeline,
    stages: Sequence[StageTimes],
    pipeline_size: int,
    count: int,
    num_microbatches: int,
    period: _Period,
) -> Timeline:
    """The iteration of `count` microbatches with as many periods in it as make `num_microbatches`."""
    import numpy as np

    microbatches, starts, ends = (
        np.array(column) for column in (begun.microbatches, begun.starts_s, begun.ends_s)
    )
    more = num_microbatches - count
    shift_s = more // period.microbatches * period.seconds
    # What starts behind the end of this microbatch is of later ones, and all before it lies before draining.
    turning = count - 2 * _MARGIN * pipeline_size
    cut_s = float(ends[microbatches == turning].max())
    later = starts >= cut_s
    makespan_s = begun.makespan_s + shift_s
    return replace(
        begun,
        microbatches=(microbatches + more * later).tolist(),
        starts_s=(starts + shift_s * later).tolist(),
        ends_s=(ends + shift_s * later).tolist(),
        makespan_s=makespan_s,
        idle_s=_idle_s(stages, pipeline_size, num_microbatches, makespan_s),
        transfer_s=tuple(seconds / count * num_microbatches for seconds in begun.transfer_s),
        left_out=LeftOut(cut_s, shift_s, more),
    )


def _idle_s(
    stages: Sequence[StageTimes], pipeline_size: int, num_microbatches: int, makespan_s: float
) -> tuple[float, ...]:
    """Of each rank."""
    loads = [
        sum(stage.forward_s + stage.backward_s for stage in stages[rank::pipeline_size])
        for rank in range(pipeline_size)
    ]
    return tuple(makespan_s - num_microbatches * load for load in loads)
