"""Models in pieces of made-up costs, for the tests of placement; and placing them by trying everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from hypothesis import strategies as st

from megatron_moe.plan.schedules import StageTimes, simulate
from megatron_moe.plan.stage_units import StageCost, stage_cost
from megatron_moe.plan.units import Activations, Kind, StaticBytes, Times, Unit, Units


def unit(
    kind: Kind,
    forward_s: float,
    backward_s: float | None = None,
    *,
    recompute_s: float | None = None,
    static: float = 1.0,
    kept: float = 1.0,
    kept_if_recomputed: float = 0.1,
    working: float = 0.5,
) -> Unit:
    """A piece; backward takes twice as long as forward, recomputation as long, unless told otherwise."""
    backward_s = 2 * forward_s if backward_s is None else backward_s
    recompute_s = forward_s if recompute_s is None else recompute_s
    return Unit(
        kind,
        StaticBytes(static, 0, 0),
        Activations(kept, kept_if_recomputed, working),
        Times(forward_s, backward_s, recompute_s, forward_s, 0, 0),
    )


def model(
    layers: int, *, dense: int = 0, head: float = 1.0, transfer_s: float = 0.0, tied: float = 0.0
) -> Units:
    """Equal layers, the first ones dense and a little faster."""
    first = unit("dense", 0.7, static=0.5, kept=0.8)
    other = unit("moe", 1.0)
    return Units(
        embedding=unit("embedding", 0.1, static=0.3, kept=0.01, kept_if_recomputed=0.01, working=0.1),
        layers=(first,) * dense + (other,) * (layers - dense),
        mtp=None,
        head=unit("head", head, static=0.3, kept=0.3, working=1.0),
        shared_embedding=StaticBytes(tied, 0, 0),
        transfer_s=transfer_s,
        transfer_bytes=0.0,
        source="made up",
    )


@st.composite
def pieces(draw: st.DrawFn, kind: Kind) -> Unit:
    """Times and bytes of few values, so that ties and near misses are common."""
    forward_s = draw(st.sampled_from([0.3, 1.0, 1.0, 1.37, 2.0]))
    return unit(
        kind,
        forward_s,
        forward_s * draw(st.sampled_from([1.0, 2.0, 2.3])),
        recompute_s=forward_s * draw(st.sampled_from([0.0, 0.5, 1.0])),
        static=draw(st.sampled_from([0.0, 1.0, 2.0])),
        kept=draw(st.sampled_from([1.0, 2.0, 3.0])),
        kept_if_recomputed=draw(st.sampled_from([0.0, 0.2, 0.5])),
        working=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@st.composite
def models(draw: st.DrawFn, layers: st.SearchStrategy[int]) -> Units:
    """Of one or two kinds of layers, in any order."""
    kinds = (draw(pieces("dense")), draw(pieces("moe")))
    order = draw(st.lists(st.sampled_from([0, 1, 1]), min_size=7, max_size=7))
    return Units(
        embedding=draw(pieces("embedding")),
        layers=tuple(kinds[kind] for kind in order[: draw(layers)]),
        mtp=draw(st.none() | pieces("mtp")),
        head=draw(pieces("head")),
        shared_embedding=StaticBytes(draw(st.sampled_from([0.0, 2.0])), 0, 0),
        mtp_embedding=StaticBytes(draw(st.sampled_from([0.0, 2.0])), 0, 0),
        transfer_s=draw(st.sampled_from([0.0, 0.0, 0.02, 0.3, 2.0])),
        transfer_bytes=0.0,
        source="made up",
    )


@dataclass(frozen=True)
class Request:
    """What `place` is asked for."""

    units: Units
    pipeline_size: int
    chunks: int
    num_microbatches: int
    memory_bytes: float | None
    fixed_layers: tuple[int, ...] | None
    fixed_recompute: tuple[int, ...] | None
    method: str
    mtp_stage: int | None


def all_placements(request: Request) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Every placement that fits, with all its recompute counts: layers a stage, those counts, makespan."""
    size = request.pipeline_size
    for layers in [request.fixed_layers] if request.fixed_layers else _compositions(request):
        counts = [range(max(layers[rank::size]) + 1) for rank in range(size)]
        for recompute in [request.fixed_recompute] if request.fixed_recompute else product(*counts):
            costs = _costs(request, layers, recompute)
            times = [StageTimes(cost.forward_s, cost.backward_s, 0.0, cost.kept_bytes) for cost in costs]
            name = "1f1b" if request.chunks == 1 else "interleaved"
            timeline = simulate(name, times, size, request.num_microbatches, request.units.transfer_s)
            needed = [
                sum(cost.memory.total for cost in costs[rank::size])
                + timeline.peak_kept_bytes[rank]
                + max(cost.working_bytes for cost in costs[rank::size])
                for rank in range(size)
            ]
            if request.memory_bytes is None or max(needed) <= request.memory_bytes:
                yield layers, recompute, timeline.makespan_s


def _compositions(request: Request, stage: int = 0, left: int | None = None) -> Iterator[tuple[int, ...]]:
    left = len(request.units.layers) if left is None else left
    last = request.pipeline_size * request.chunks - 1
    if stage == last:
        is_behind_mtp = request.units.mtp is not None and request.mtp_stage == last - 1
        if not left or not is_behind_mtp:
            yield (left,)
        return
    for count in range(0 if stage == 0 else 1, left + 1):
        for others in _compositions(request, stage + 1, left - count):
            yield (count, *others)


def _costs(request: Request, layers: tuple[int, ...], recompute: tuple[int, ...]) -> list[StageCost]:
    costs, first, last = [], 0, len(layers) - 1
    mtp_stage = last if request.mtp_stage is None else request.mtp_stage
    for stage, count in enumerate(layers):
        costs.append(
            stage_cost(
                request.units,
                range(first, first + count),
                method=request.method,
                count=recompute[stage % request.pipeline_size],
                is_first=stage == 0,
                is_last=stage == last,
                has_mtp=stage == mtp_stage,
            )
        )
        first += count
    return costs
