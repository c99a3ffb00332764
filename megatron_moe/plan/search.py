"""A better layout for an experiment on so many GPUs.

Each candidate (`search_space`) gets an estimate of its iteration, from the costs of its pieces spread evenly
over the stages; what cannot fit however much is computed again is left out. From the best estimate on, layers
and recomputation are placed and the schedule is simulated, until the estimates left are slower than the tenth
best iteration found.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from megatron_moe.config.errors import InputError
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import Experiment
from megatron_moe.plan import journeys, timing
from megatron_moe.plan.assembly import assemble
from megatron_moe.plan.auto import placed
from megatron_moe.plan.batch_ramp import num_microbatches
from megatron_moe.plan.cluster import Cluster
from megatron_moe.plan.forecast import Forecast
from megatron_moe.plan.forecasting import foretell
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.search_space import Candidate, candidates, with_candidate
from megatron_moe.plan.stages import stages_of
from megatron_moe.plan.units import LAYERS, Unit, Units, pieces_of

SHOWN = 10
_PLACED_AT_MOST = 120
"""Candidates whose layers are placed: an end for spaces whose estimates lie close together."""
_SLACK = 1.02
"""An estimate may be too slow by so much, so that candidates up to that beyond the tenth best are placed."""


@dataclass(frozen=True)
class Found:
    """A candidate that fits, with what the planner foretells of it."""

    candidate: Candidate
    experiment: Experiment
    """With lists of layers and of recomputed layers."""
    forecast: Forecast
    dispatcher: str | None
    """None for a dense model."""


@dataclass(frozen=True)
class Search:
    """What a search came to.

    Attributes:
        best: at most ten, the fastest first.
        considered: candidates that the rules about sizes allow.
        too_large: those of them that cannot fit.
        placed: those whose layers were placed and whose schedule was simulated.
    """

    best: tuple[Found, ...]
    considered: int
    too_large: int
    placed: int


@dataclass(frozen=True)
class _Estimate:
    seconds: float
    lacking_bytes: float
    """What the fullest rank needs above its memory at least; 0 or less where it may fit."""
    candidate: Candidate


def search(experiment: Experiment, gpus: int) -> Search:
    """The fastest layouts of a filled experiment on so many GPUs of `launch.cluster`.

    Raises InputError where nothing fits, with what is missing, and where no layout of so many ranks is
    allowed.
    """
    cluster = Cluster.of(experiment)
    memo: dict[Hashable, tuple[Units, float]] = {}
    estimates = [
        _estimate(experiment, candidate, cluster, memo)
        for candidate in candidates(experiment, gpus, cluster.gpus_per_node)
    ]
    if not estimates:
        raise InputError(
            f"training.global_batch_size = {experiment.training.global_batch_size}: no layout of {gpus} "
            "ranks divides it and the model's sizes; use another --gpus"
        )
    may_fit = sorted(
        (estimate for estimate in estimates if estimate.lacking_bytes <= 0),
        key=lambda estimate: (estimate.seconds, estimate.candidate),
    )
    found, placed = _place_best(experiment, may_fit)
    if not found:
        nearest = min(estimates, key=lambda estimate: estimate.lacking_bytes)
        raise InputError(_nothing_fits(nearest, gpus, cluster))
    return Search(tuple(found[:SHOWN]), len(estimates), len(estimates) - len(may_fit), placed)


def _estimate(
    experiment: Experiment, candidate: Candidate, cluster: Cluster, memo: dict[Hashable, tuple[Units, float]]
) -> _Estimate:
    """An iteration with all costs spread evenly over the stages, and the least memory of the mean rank."""
    changed = with_candidate(experiment, candidate)
    layout = Layout.of(changed)
    # Neither depends on how many chunks the stages are cut into, and DP settles PP.
    key = replace(candidate, chunks=1, recompute=candidate.recompute)
    if key not in memo:
        memo[key] = _spread(changed, layout, cluster)
    units, after_s = memo[key]
    pieces = pieces_of(units)
    stages, microbatches = candidate.pipeline, num_microbatches(changed)
    in_flight = _mean_in_flight(stages, candidate.chunks, microbatches)
    static = sum(piece.memory.total for piece in pieces) / stages
    kept = _kept(pieces, again=False) * in_flight / stages
    least = _kept(pieces, again=True) * in_flight / stages if candidate.recompute == "auto" else kept
    limit = cluster.usable_bytes
    lacking = 0.0 if limit is None else static + least - limit
    recomputed = 0.0
    if limit is not None and kept > least:
        recomputed = min(1.0, max(0.0, (static + kept - limit) / (kept - least)))
    layer_s = [
        unit.times.forward_s + unit.times.backward_s + recomputed * unit.times.recompute_s
        for unit in units.layers
    ]
    beside_s = [
        piece.times.forward_s + piece.times.backward_s for piece in pieces if piece.kind not in LAYERS
    ]
    busy = sum(layer_s) + sum(beside_s)
    slowest = _slowest_rank_s(sum(layer_s) / len(layer_s), len(layer_s), beside_s, stages)
    filling = (stages - 1) * (busy / stages / candidate.chunks + 2 * units.transfer_s)
    return _Estimate(microbatches * slowest + filling + after_s, lacking, candidate)


def _slowest_rank_s(layer_s: float, layers: int, beside_s: Sequence[float], stages: int) -> float:
    """The slowest of the ranks where whole layers are spread as evenly as they can be, those with the
    embedding and the loss holding fewer."""
    if stages == 1:
        return layers * layer_s + sum(beside_s)
    first, last = beside_s[0], sum(beside_s[1:])
    times = sorted(
        count * layer_s + beside
        for beside in (0.0, first, last)
        for count in range(layers // stages + 2 + int(max(first, last) / layer_s))
    )

    def held(limit: float) -> int:
        """Layers that the ranks can hold within that time."""
        of_each = [*[0.0] * (stages - 2), first, last]
        if any(beside > limit for beside in of_each):
            return -1
        return sum(int((limit - beside) / layer_s + 1e-9) for beside in of_each)

    return next((limit for limit in times if held(limit) >= layers), times[-1])


def _spread(experiment: Experiment, layout: Layout, cluster: Cluster) -> tuple[Units, float]:
    """The pieces, and seconds of gradients and update where each stage holds its part of them."""
    units = assemble(experiment, layout, cluster, None)
    pieces = pieces_of(units)
    stages = layout.pipeline_model_parallel_size
    held = {kind: count / stages for kind, count in Counter(piece.kind for piece in pieces).items()}
    forward_s, backward_s = (
        sum(getattr(piece.times, name) for piece in pieces) / stages for name in ("forward_s", "backward_s")
    )
    return units, sum(timing.after_pieces(experiment, layout, cluster, held, forward_s, backward_s))


def _kept(pieces: list[Unit], again: bool) -> float:
    """Bytes of one microbatch kept on all stages together, layers computed again or not."""
    return sum(
        piece.activations.kept_if_recomputed if again and piece.kind in LAYERS else piece.activations.kept
        for piece in pieces
    )


def _mean_in_flight(stages: int, chunks: int, microbatches: int) -> float:
    """Microbatches whose activations a rank keeps, the mean over ranks; a chunk's are a part of one."""
    if chunks == 1:
        return sum(min(stages - rank, microbatches) for rank in range(stages)) / stages
    passes = (2 * (stages - rank - 1) + (chunks - 1) * stages + 1 for rank in range(stages))
    return sum(min(count / chunks, microbatches) for count in passes) / stages


def _place_best(experiment: Experiment, ordered: list[_Estimate]) -> tuple[list[Found], int]:
    """Those that fit, the fastest first, and how many were placed."""
    found: dict[Hashable, Found] = {}
    tried = 0
    for estimate in ordered:
        seconds = sorted(one.forecast.iteration_s for one in found.values())
        tenth = seconds[SHOWN - 1] if len(found) >= SHOWN else math.inf
        if tried == _PLACED_AT_MOST or estimate.seconds > tenth * _SLACK:
            break
        # Of those that are alike but for chunks and recomputation the best one is shown.
        key = replace(estimate.candidate, chunks=1, recompute="")
        if key in found and found[key].forecast.iteration_s <= estimate.seconds:
            continue
        tried += 1
        one = _placed(experiment, estimate.candidate)
        if one is not None and (
            key not in found or one.forecast.iteration_s < found[key].forecast.iteration_s
        ):
            found[key] = one
    return sorted(found.values(), key=lambda one: one.forecast.iteration_s), tried


def _placed(experiment: Experiment, candidate: Candidate) -> Found | None:
    """The candidate with its layers placed; None where it does not fit or a rule forbids it."""
    changed = with_candidate(experiment, candidate)
    if violations(changed):
        return None
    try:
        changed = placed(changed, None)
    except InputError:
        return None
    layout, cluster = Layout.of(changed), Cluster.of(changed)
    units = assemble(changed, layout, cluster, None)
    forecast = foretell(changed, layout, stages_of(changed), units, cluster)
    dispatcher = None if changed.moe is None else journeys.choice(changed).dispatcher
    return Found(candidate, changed, forecast, dispatcher)


def _nothing_fits(nearest: _Estimate, gpus: int, cluster: Cluster) -> str:
    c = nearest.candidate
    assert cluster.usable_bytes is not None
    return (
        f"launch.cluster.memory_gib = {cluster.memory_bytes / 2**30:g}: no layout of {gpus} GPUs fits; the "
        f"nearest, TP {c.tensor} PP {c.pipeline} CP {c.context} EP {c.expert}, all layers computed again, "
        f"needs {nearest.lacking_bytes / 2**30:.1f} GiB more on each; use more GPUs, or larger ones"
    )
