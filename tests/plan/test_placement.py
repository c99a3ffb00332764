"""Placed layers and recomputation against trying every placement, and on models of full size."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from placed_units import Request, all_placements, model, models, unit

from megatron_moe.plan.placement.candidates import Candidates
from megatron_moe.plan.placement.placement import NothingFits, Placement, place
from megatron_moe.plan.placement.rank_choices import RankChoices
from megatron_moe.plan.placement.stage_options import at, cycles_between, options_of, rests_of
from megatron_moe.plan.schedules.many import bounds

memories = st.sampled_from([None, None, 8.0, 12.0, 16.0, 20.0, 30.0])


def placed(request: Request) -> Placement:
    return place(**{name: getattr(request, name) for name in Request.__dataclass_fields__})


@st.composite
def requests(draw: st.DrawFn, chunks: int) -> Request:
    pipeline_size = draw(st.integers(1, 4)) if chunks == 1 else 2
    stages = pipeline_size * chunks
    units = draw(models(st.integers(max(1, stages - 2), 6)))
    rounds = draw(st.integers(1, 3))
    microbatches = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 13])) if chunks == 1 else rounds * pipeline_size
    return Request(
        units,
        pipeline_size,
        chunks,
        microbatches,
        draw(memories),
        None,
        draw(st.none() | st.just((0,) * pipeline_size)),
        draw(st.sampled_from(["block", "uniform"])),
        draw(st.none() | st.integers(max(0, stages - 2), stages - 1)),
    )


def assert_is_fastest(request: Request) -> None:
    everything = list(all_placements(request))
    if not everything:
        with pytest.raises(NothingFits) as error:
            placed(request)
        assert max(error.value.missing_bytes) > 0
        return
    found = placed(request)
    shortest = min(makespan for _, _, makespan in everything)
    assert found.makespan_s == pytest.approx(shortest, rel=1e-8)
    assert found.bound_s == pytest.approx(shortest, rel=1e-8)
    spans = {(layers, recompute): makespan for layers, recompute, makespan in everything}
    recorded = spans[found.layers_per_stage, found.recompute_per_rank]
    assert recorded == pytest.approx(found.makespan_s, rel=1e-8)


@settings(max_examples=100)
@given(requests(chunks=1))
def test_no_placement_that_fits_is_faster(request: Request) -> None:
    """1F1B, with and without a memory limit, fixed and free recomputation, both methods."""
    assert_is_fastest(request)


@settings(max_examples=60)
@given(requests(chunks=2))
def test_no_interleaved_placement_that_fits_is_faster(request: Request) -> None:
    """Two chunks a rank share its memory and its recompute count."""
    assert_is_fastest(request)


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(requests(chunks=1))
def test_of_a_million_microbatches_the_slowest_rank_is_as_fast_as_any_placement_makes_it(
    request: Request,
) -> None:
    """Most of them are not simulated; what counts is the pace, and a filling of the pipeline is 1e-5 here."""
    request = replace(request, num_microbatches=1_000_000 // request.pipeline_size * request.pipeline_size)
    spans = {(layers, recompute): makespan for layers, recompute, makespan in all_placements(request)}
    if not spans:
        return
    found, shortest = placed(request), min(spans.values())
    assert spans[found.layers_per_stage, found.recompute_per_rank] == pytest.approx(shortest, rel=5e-5)
    assert found.bound_s <= shortest * (1 + 1e-9)
    assert found.makespan_s == pytest.approx(shortest, rel=5e-5)


@settings(max_examples=40)
@given(requests(chunks=1), st.data())
def test_of_fixed_layers_only_the_recomputation_is_placed(request: Request, data: st.DataObject) -> None:
    """Any layers that somebody wrote down."""
    layers = []
    for stage in range(request.pipeline_size):
        left = len(request.units.layers) - sum(layers)
        is_last = stage == request.pipeline_size - 1
        layers.append(left if is_last else data.draw(st.integers(0, left)))
    request = replace(request, mtp_stage=request.pipeline_size - 1)
    assert_is_fastest(replace(request, fixed_layers=tuple(layers), fixed_recompute=None))


@settings(max_examples=20)
@given(
    models(st.just(6)),
    st.sampled_from([3, 4, 5]),
    st.sampled_from([1, 2, 3, 4, 5, 6, 9, 16]),
    st.sampled_from([None, 16.0, 30.0]),
)
def test_bounds_of_first_stages_are_below_every_placement_that_begins_so(
    units: object, pipeline_size: int, microbatches: int, memory: float | None
) -> None:
    """A bound that is too high would rule out the fastest placement; each number of `Rest` counts."""
    choices = RankChoices(
        units,  # type: ignore[arg-type]
        pipeline_size=pipeline_size,
        chunks=1,
        num_microbatches=microbatches,
        memory_bytes=memory,
        fixed_recompute=None,
        method="block",
        mtp_stage=None,
    )
    candidates = Candidates(choices, microbatches)
    options = options_of(candidates, np.inf)
    request = Request(
        candidates.choices.units, pipeline_size, 1, microbatches, memory, None, None, "block", None
    )
    shortest: dict[tuple[int, ...], float] = {}
    for layers, _, makespan in all_placements(request):
        for depth in range(1, pipeline_size):
            begins = layers[:depth]
            shortest[begins] = min(makespan, shortest.get(begins, np.inf))
    if not shortest:
        return
    cycles = cycles_between(options, 0.1, 60.0)
    rests = rests_of(options, microbatches, candidates.transfer_s, cycles)
    assert rests[0].own[0] <= min(shortest.values()) * (1 + 1e-9)
    for begins, least in shortest.items():
        first, forward, backward = 0, [], []
        for stage, count in enumerate(begins):
            cost = choices.choice(stage, [range(first, first + count)]).costs[0]
            forward.append([cost.forward_s])
            backward.append([cost.backward_s])
            first += count
        bound = bounds(
            np.array(forward),
            np.array(backward),
            pipeline_size,
            microbatches,
            candidates.transfer_s,
            at(rests[len(begins)], np.array([first])),
        )
        assert bound[0] <= least * (1 + 1e-9)


def request_of(layers: int, pipeline_size: int, microbatches: int, **changes: object) -> Request:
    """Of a model of equal layers with a loss as heavy as one."""
    units = model(
        layers, dense=int(changes.pop("dense", 0)), transfer_s=float(changes.pop("transfer_s", 0.0))
    )
    plain = Request(units, pipeline_size, 1, microbatches, None, None, None, "block", None)
    return replace(plain, **changes)


@pytest.mark.parametrize(
    "request_",
    [
        request_of(52, 16, 8),
        request_of(52, 16, 500, transfer_s=0.02),
        request_of(61, 16, 64, dense=3, transfer_s=0.02, memory_bytes=45.0),
        request_of(94, 16, 16),
        request_of(126, 16, 8),
        request_of(126, 16, 64, transfer_s=0.02, memory_bytes=60.0),
        request_of(126, 16, 256, memory_bytes=80.0, method="uniform"),
    ],
    ids=lambda r: f"{len(r.units.layers)}-{r.num_microbatches}-{r.memory_bytes}",
)
def test_full_size_models_are_placed_with_proof(request_: Request) -> None:
    """52 to 126 layers over 16 stages, memory binding or not: no gap is left."""
    found = placed(request_)
    assert found.gap == 0
    assert sum(found.layers_per_stage) == len(request_.units.layers)
    assert found.bound_s == found.makespan_s


def test_24_layers_with_a_loss_like_one_are_placed_as_skywork_did() -> None:
    """[5, 5, 5, 5, 4]: the loss counts as a layer of the last of 5 stages."""
    assert placed(request_of(24, 5, 128)).layers_per_stage == (5, 5, 5, 5, 4)


def test_first_stages_recompute_more_as_they_keep_more_microbatches() -> None:
    """Where memory binds, counts fall from the first stage to the last, and none is higher than needed."""
    found = placed(request_of(52, 16, 64, memory_bytes=30.0))
    counts = found.recompute_per_rank
    assert counts[0] > 0 and counts[-1] == 0
    assert sorted(counts, reverse=True) == list(counts)


def test_interleaved_placements_say_how_far_they_may_be_from_the_best() -> None:
    """Where not all are tried, the gap is a number."""
    found = placed(replace(request_of(48, 8, 64, transfer_s=0.02), chunks=2))
    assert sum(found.layers_per_stage) == 48 and len(found.layers_per_stage) == 16
    assert 0 < found.gap < 0.05


def test_what_is_missing_and_what_would_do_is_said() -> None:
    """The fullest stage, in bytes; recomputation where there was to be none; a larger PP."""
    gibibyte = 2.0**30
    light = request_of(12, 2, 8, memory_bytes=14.0, fixed_recompute=(0, 0))
    with pytest.raises(NothingFits, match=r"more on stage \d.* or recompute of \d layers? there would do"):
        placed(light)

    units = light.units
    heavy = [
        replace(layer, memory=replace(layer.memory, weights=4.2 * gibibyte)) for layer in units.layers[:8]
    ]
    request = replace(
        light, units=replace(units, layers=tuple(heavy)), memory_bytes=14 * gibibyte, fixed_recompute=None
    )
    with pytest.raises(NothingFits) as error:
        placed(request)
    assert "needs 2.80 GiB more on stage" in str(error.value)
    assert "PP=4 (with as many replicas) would do" in str(error.value)
    assert max(error.value.missing_bytes) == pytest.approx((4 * 4.2 - 14) * gibibyte, rel=1e-6)
    assert error.value.pipeline_size == 4 and error.value.recompute is None


@pytest.mark.parametrize(("dense", "named"), [(8, "raise TP, or"), (2, "raise TP or EP, or")])
def test_where_nothing_would_do_only_ranks_that_help_are_named(dense: int, named: str) -> None:
    """A dense model has no experts to spread."""
    with pytest.raises(NothingFits, match=named):
        placed(request_of(8, 2, 8, dense=dense, memory_bytes=0.5))


def test_a_placement_is_the_same_each_time() -> None:
    """Ties are broken alike: more even, less recomputation."""
    request = request_of(52, 16, 64, transfer_s=0.02)
    assert asdict(placed(request)) == asdict(placed(request))


@pytest.mark.parametrize("layers", [1_000, 10_000])
def test_very_many_layers_are_placed_without_a_proof(layers: int) -> None:
    """64 stages: about an even split, and a bound below it, instead of a search without end."""
    found = placed(request_of(layers, 64, 64))
    assert sum(found.layers_per_stage) == layers
    assert max(found.layers_per_stage) - min(found.layers_per_stage) <= 3
    assert 0 < found.bound_s <= found.makespan_s and found.gap < 0.25


def test_the_bound_without_a_search_is_below_the_fastest() -> None:
    """Of every number of microbatches and stages."""
    for stages, microbatches in [(2, 1), (2, 9), (5, 1), (5, 3), (5, 64)]:
        request = request_of(24, stages, microbatches, transfer_s=0.02)
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr("megatron_moe.plan.placement.placement._PROVABLE", 0)
            bound = placed(request).bound_s
        assert 0 < bound <= placed(request).makespan_s * (1 + 1e-9)


@pytest.mark.parametrize("memory_bytes", [None, 30.0])
@pytest.mark.parametrize("chunks", [1, 2])
def test_no_layer_is_behind_multi_token_prediction(chunks: int, memory_bytes: float | None) -> None:
    """On the stage before the loss it stands behind all layers, which then end there."""
    request = request_of(12, 3, 6, chunks=chunks, memory_bytes=memory_bytes, mtp_stage=3 * chunks - 2)
    units = replace(request.units, mtp=unit("mtp", 1.2))
    found = placed(replace(request, units=units))
    assert found.layers_per_stage[-1] == 0
    assert sum(found.layers_per_stage) == 12


def test_one_layer_on_two_stages_is_placed_whatever_rounding_does() -> None:
    """The makespan by microbatches is a hair below what the only layer takes five times."""
    request = request_of(1, 2, 5)
    units = replace(
        request.units,
        embedding=unit("embedding", 0.3),
        layers=(unit("dense", 0.3, 0.6),),
        head=unit("head", 0.3, 0.3),
    )
    assert sum(placed(replace(request, units=units)).layers_per_stage) == 1
