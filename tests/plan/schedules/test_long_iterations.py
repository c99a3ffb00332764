"""An iteration of which the middle is left out against the same one pass by pass."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.plan.schedules import StageTimes, Timeline, extent, simulate, simulate_whole
from megatron_moe.plan.schedules.in_flight import peaks
from megatron_moe.plan.schedules.long_iterations import SIMULATED_WHOLE

exact = st.integers(0, 4).map(float)
uneven = st.floats(0.0, 1.0, allow_subnormal=False)
alike = st.floats(1.0, 1.01)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[StageTimes], int, int, float]:
    """A schedule, its stages, PP, microbatches and the time of a transfer."""
    name = draw(st.sampled_from(["1f1b", "interleaved", "zero-bubble"]))
    pipeline_size = draw(st.integers(2 if name == "interleaved" else 1, 5))
    chunks = draw(st.integers(2, 3)) if name == "interleaved" else 1
    microbatches = draw(st.integers(SIMULATED_WHOLE + 1, SIMULATED_WHOLE + 600))
    if name == "interleaved":
        microbatches += -microbatches % pipeline_size
    seconds = draw(st.sampled_from([exact, uneven, alike]))
    stages = []
    for _ in range(pipeline_size * chunks):
        backward = draw(seconds)
        stages.append(StageTimes(draw(seconds), backward, backward * draw(uneven), 1 + draw(uneven)))
    return name, stages, pipeline_size, microbatches, draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))


def passes(timeline: Timeline) -> dict[tuple[str, int, int], tuple[float, float]]:
    names = zip(timeline.kinds, timeline.stages, timeline.microbatches, strict=True)
    return dict(zip(names, zip(timeline.starts_s, timeline.ends_s, strict=True), strict=True))


@settings(max_examples=40)
@given(cases())
def test_passes_behind_the_gap_are_where_the_whole_iteration_has_them(
    case: tuple[str, list[StageTimes], int, int, float],
) -> None:
    _, stages, _, microbatches, _ = case
    found, whole = simulate(*case), simulate_whole(*case)
    if found.left_out is None:  # ranks nearly as slow, and not long enough to guess
        assert all(1 <= stage.forward_s <= 1.01 for stage in stages)
    else:
        assert found.left_out.microbatches > 0 and len(found.kinds) < len(whole.kinds)
    tolerance = 1e-8 * whole.makespan_s
    expected = passes(whole)
    for one, (start, end) in passes(found).items():
        assert start == pytest.approx(expected[one][0], abs=tolerance)
        assert end == pytest.approx(expected[one][1], abs=tolerance)
    last = {("F", stage, microbatches - 1) for stage in range(len(stages))}
    assert last <= passes(found).keys(), "the end of the iteration is there"
    assert found.makespan_s == pytest.approx(whole.makespan_s, rel=1e-8)
    assert found.idle_s == pytest.approx(whole.idle_s, abs=tolerance)
    assert found.transfer_s == pytest.approx(whole.transfer_s)
    assert found.peak_in_flight == whole.peak_in_flight
    assert found.peak_kept_bytes == pytest.approx(whole.peak_kept_bytes)


@pytest.mark.parametrize("transfer", [0.0, 0.3])
def test_all_forwards_before_all_backwards_take_the_slowest_stages_time_each(transfer: float) -> None:
    stages = [StageTimes(1.0, 2.5, kept_bytes=2.0), StageTimes(1.5, 2.0), StageTimes(0.5, 2.2)]
    case = ("gpipe", stages, 3, SIMULATED_WHOLE + 100, transfer)
    found, whole = extent(*case), simulate_whole(*case)
    assert found.makespan_s == pytest.approx(whole.makespan_s)
    assert found.idle_s == pytest.approx(whole.idle_s)
    assert found.transfer_s == pytest.approx(whole.transfer_s)
    assert found.peak_in_flight == whole.peak_in_flight
    assert found.peak_kept_bytes == pytest.approx(whole.peak_kept_bytes)


def test_ranks_nearly_as_slow_are_counted_at_the_slower_ones_pace() -> None:
    """Each rank gets later by its own time a microbatch, until the slowest one has filled all waits."""
    stages = [StageTimes(1.0, 2.0)] * 4 + [StageTimes(1.0, 2.0 + 1e-7)]
    count = 20_000_000
    found = extent("1f1b", stages, 5, count)
    assert found.makespan_s == pytest.approx(count * (3 + 1e-7) + 4 * 3, abs=4 * 3)


def test_more_rounds_of_an_interleaved_schedule_keep_no_other_microbatches() -> None:
    for pipeline_size, chunks in ((2, 2), (3, 4), (4, 2)):
        for rank in range(pipeline_size):
            shapes = {
                peaks("interleaved", rank, pipeline_size, chunks, rounds * pipeline_size)
                for rounds in (4, 5, 9, 10**9)
            }
            assert len(shapes) == 1
