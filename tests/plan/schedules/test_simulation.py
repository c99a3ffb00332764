"""The simulated schedules against longest paths, formulas of papers, and published figures."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.plan.schedules import StageTimes, Timeline, simulate
from megatron_moe.plan.schedules.many import makespans

seconds = st.floats(0.0, 10.0, allow_subnormal=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[StageTimes], int, int, float]:
    """A schedule, its stages, PP, microbatches and the time of a transfer."""
    name = draw(st.sampled_from(["1f1b", "interleaved", "gpipe", "zero-bubble"]))
    pipeline_size = draw(st.integers(2 if name == "interleaved" else 1, 4))
    chunks = draw(st.integers(1, 3)) if name == "interleaved" else 1
    microbatches = draw(st.integers(1, 4)) * pipeline_size
    if name != "interleaved":
        microbatches = draw(st.integers(1, 9))
    stages = []
    for _ in range(pipeline_size * chunks):
        backward = draw(seconds)
        part = draw(st.floats(0.0, 1.0))
        stages.append(StageTimes(draw(seconds), backward, backward * part, draw(seconds)))
    return name, stages, pipeline_size, microbatches, draw(seconds)


def passes(timeline: Timeline) -> list[tuple[str, int, int]]:
    return list(zip(timeline.kinds, timeline.stages, timeline.microbatches, strict=True))


@given(cases())
def test_each_pass_runs_once_when_all_it_waits_for_is_there(
    case: tuple[str, list[StageTimes], int, int, float],
) -> None:
    """Every end is the longest path to it: through the pass before it on its rank, and through its input."""
    name, stages, pipeline_size, microbatches, transfer = case
    timeline = simulate(name, stages, pipeline_size, microbatches, transfer)
    kinds = ("F", "B", "W") if name == "zero-bubble" else ("F", "B")
    everything = {(k, s, m): 1 for k in kinds for s in range(len(stages)) for m in range(microbatches)}
    assert Counter(passes(timeline)) == everything

    before: dict[tuple[str, int, int], tuple[str, int, int]] = {}
    ranks = dict(zip(passes(timeline), timeline.pipeline_ranks, strict=True))
    for one, following in zip(passes(timeline), passes(timeline)[1:], strict=False):
        if ranks[one] == ranks[following]:
            before[following] = one

    def lasts(kind: str, stage: int) -> float:
        if kind == "F":
            return stages[stage].forward_s
        put_off = stages[stage].weight_gradient_s if name == "zero-bubble" else 0.0
        return put_off if kind == "W" else stages[stage].backward_s - put_off

    @cache
    def longest(kind: str, stage: int, microbatch: int) -> float:
        starts = [0.0]
        if (kind, stage, microbatch) in before:
            starts.append(longest(*before[kind, stage, microbatch]))
        hop = transfer if pipeline_size > 1 else 0.0
        if kind == "F" and stage > 0:
            starts.append(longest("F", stage - 1, microbatch) + hop)
        if kind == "B" and stage < len(stages) - 1:
            starts.append(longest("B", stage + 1, microbatch) + hop)
        if kind == "B":
            starts.append(longest("F", stage, microbatch))
        if kind == "W":
            starts.append(longest("B", stage, microbatch))
        return max(starts) + lasts(kind, stage)

    ends = np.array([longest(*one) for one in passes(timeline)])
    np.testing.assert_allclose(timeline.ends_s, ends, rtol=1e-12)
    assert timeline.makespan_s == pytest.approx(ends.max())
    for rank, idle in enumerate(timeline.idle_s):
        load = sum(stage.forward_s + stage.backward_s for stage in stages[rank::pipeline_size])
        assert timeline.makespan_s >= microbatches * load * (1 - 1e-12)
        assert idle == pytest.approx(timeline.makespan_s - microbatches * load, abs=1e-9)


@given(cases())
def test_many_placements_at_once_take_as_long_as_each_alone(
    case: tuple[str, list[StageTimes], int, int, float],
) -> None:
    """The planner compares placements by a vectorized simulation; it must be this one."""
    name, stages, pipeline_size, microbatches, transfer = case
    if name in ("zero-bubble", "gpipe"):
        name = "1f1b"
    variants = [stages, stages[::-1]]
    forward = np.array([[stage.forward_s for stage in variant] for variant in variants]).T
    backward = np.array([[stage.backward_s for stage in variant] for variant in variants]).T
    together = makespans(name, forward, backward, pipeline_size, microbatches, transfer)
    alone = [
        simulate(name, variant, pipeline_size, microbatches, transfer).makespan_s for variant in variants
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-12, atol=1e-12)


def throughput(layers: list[int], loss: float, microbatches: int) -> float:
    """Microbatches a second and device; a layer takes 1 s forward and 2 s backward, the loss as much times
    `loss` on the last stage."""
    stages = [StageTimes(count, 2 * count) for count in layers]
    stages[-1] = StageTimes(layers[-1] + loss, 2 * (layers[-1] + loss))
    return microbatches / simulate("1f1b", stages, len(layers), microbatches).makespan_s / len(layers)


@pytest.mark.parametrize(
    ("loss", "microbatches", "gain"), [(1, 8, -0.01), (1, 32, 0.076), (1, 128, 0.108), (0.7, 128, 0.062)]
)
def test_an_uneven_split_gains_what_skywork_reports(loss: float, microbatches: int, gain: float) -> None:
    """24 layers as [5, 5, 5, 5, 4] against [6, 6, 6, 6]: about 10 % with many microbatches, a loss with few
    (Skywork-MoE, appendix B.2)."""
    uneven = throughput([5, 5, 5, 5, 4], loss, microbatches)
    even = throughput([6, 6, 6, 6], loss, microbatches)
    assert uneven / even - 1 == pytest.approx(gain, abs=0.005)


@pytest.mark.parametrize(("pipeline_size", "microbatches"), [(4, 8), (8, 16), (5, 40)])
def test_bubbles_of_equal_stages_are_those_of_the_papers(pipeline_size: int, microbatches: int) -> None:
    """GPipe and 1F1B: (p - 1)(f + b); interleaved with v chunks: a v-th of that (Narayanan et al. 2021,
    section 2.2); ZB-H1: (p - 1)(f + b - 2 w), b with w (Qi et al. 2023, table 2)."""
    forward, backward, weights, chunks = 1.0, 2.1, 0.9, 2
    stages = [StageTimes(forward, backward, weights)] * pipeline_size

    def bubble(name: str, of: list[StageTimes], count: int) -> float:
        busy = count * sum(stage.forward_s + stage.backward_s for stage in of[::pipeline_size])
        return simulate(name, of, pipeline_size, count).makespan_s - busy

    plain = (pipeline_size - 1) * (forward + backward)
    assert bubble("gpipe", stages, microbatches) == pytest.approx(plain)
    assert bubble("1f1b", stages, microbatches) == pytest.approx(plain)
    whole = 2 * pipeline_size
    halves = [StageTimes(forward / chunks, backward / chunks)] * (chunks * pipeline_size)
    assert bubble("interleaved", halves, whole) == pytest.approx(plain / chunks)
    put_off = (pipeline_size - 1) * (forward + backward - 2 * weights)
    assert bubble("zero-bubble", stages, microbatches) == pytest.approx(put_off)


def test_ranks_keep_as_many_microbatches_as_the_schedule_has_in_flight() -> None:
    """1F1B: PP on the first rank, 1 on the last; ZB-H1: PP on each; GPipe: all; interleaved: the warm-up and
    one more."""
    stages = [StageTimes(1, 2, 1, kept_bytes=10.0)] * 4
    in_flight = {
        name: simulate(name, stages, 4, 12).peak_in_flight for name in ("1f1b", "zero-bubble", "gpipe")
    }
    assert in_flight == {"1f1b": (4, 3, 2, 1), "zero-bubble": (4, 4, 4, 4), "gpipe": (12, 12, 12, 12)}
    chunks = [StageTimes(1, 2, kept_bytes=10.0)] * 4 + [StageTimes(1, 2, kept_bytes=1.0)] * 4
    interleaved = simulate("interleaved", chunks, 4, 12)
    assert interleaved.peak_in_flight == (11, 9, 7, 5)
    assert simulate("1f1b", stages, 4, 12).peak_kept_bytes == (40, 30, 20, 10)
    # Rank 0 at its fullest: the second four microbatches are all in, the first one is back from chunk 1.
    assert interleaved.peak_kept_bytes[0] == 8 * 10 + 3 * 1


def test_transfers_are_those_between_ranks() -> None:
    """The first and the last stage send one way only; one rank sends nothing."""
    stages = [StageTimes(1, 2)] * 3
    assert simulate("1f1b", stages, 3, 4, transfer_s=0.5).transfer_s == (2.0, 4.0, 2.0)
    alone = simulate("1f1b", stages[:1], 1, 4, transfer_s=0.5)
    assert alone.transfer_s == (0.0,) and alone.makespan_s == 12
