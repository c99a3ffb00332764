"""What a candidate of a search comes to at best, without placing its layers.

Layers count with their mean, and whole ones are spread over the ranks as evenly as they can be, the ranks
with the embedding and the loss holding fewer; so placements are rarely faster. An estimate at first sight
takes the memory of the mean rank; one at second sight takes each rank's, with the microbatches that it has in
flight and the layers that it must compute again.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.assembly import Running, assemble
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.search.space import Candidate, with_candidate
from megatron_moe.plan.times import timing
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.units import LAYERS, Kind, StaticBytes, Unit, Units, pieces_of

_EXACT = 1e-4
"""To which part an estimate at second sight is found."""


@dataclass(frozen=True)
class Estimate:
    """One candidate's."""

    seconds: float
    """Of an iteration."""
    lacking_bytes: float
    """What the mean rank needs above its memory at least; 0 or less where it may fit."""
    candidate: Candidate


@dataclass(frozen=True)
class _Model:
    """A layout's pieces, summed up. Times and kept bytes are of one microbatch through all stages."""

    layers: int
    layer_s: float
    again_s: float
    """What a layer takes longer that is computed again."""
    layer_bytes: float
    """Of a layer, whatever is in flight."""
    kept_by_layer: float
    saved_by_layer: float
    """What computing a layer again saves of that."""
    first_s: float
    """The embedding."""
    last_s: float
    """Output layer and loss, and multi-token prediction."""
    first_bytes: float
    last_bytes: float
    """Of these, with what one microbatch keeps."""
    static_bytes: float
    kept_bytes: float
    least_kept_bytes: float
    """The same where all layers are computed again."""
    transfer_s: float
    after_s: float
    """Gradients and update, behind the pipeline."""


class Estimates:
    """Estimates of an experiment's candidates on a cluster, which remember the pieces of layouts."""

    def __init__(self, experiment: Experiment, cluster: Cluster) -> None:
        self._experiment, self._cluster = experiment, cluster
        self._models: dict[Candidate, _Model] = {}
        self._memories: dict[tuple[int, ...], dict[Kind, StaticBytes]] = {}
        self._running: dict[tuple[object, ...], Running] = {}

    def at_first_sight(self, candidate: Candidate) -> Estimate:
        """By the mean rank's memory."""
        model, stages, limit = self._model(candidate), candidate.pipeline, self._cluster.usable_bytes
        microbatches = self._microbatches(candidate)
        in_flight = fmean(_in_flight(candidate, microbatches))
        static = model.static_bytes / stages
        kept, least = (kept * in_flight / stages for kept in (model.kept_bytes, model.least_kept_bytes))
        if candidate.recompute != "auto":
            least = kept
        lacking = recomputed = 0.0
        if limit is not None:
            lacking = static + least - limit
            if kept > least:
                recomputed = min(1.0, max(0.0, (static + kept - limit) / (kept - least)))
        slowest_s = _slowest_rank_s(model, model.layer_s + recomputed * model.again_s, stages)
        return Estimate(self._iteration_s(candidate, slowest_s), lacking, candidate)

    def at_second_sight(self, candidate: Candidate) -> Estimate | None:
        """By each rank's memory; None where it does not fit."""
        model, limit = self._model(candidate), self._cluster.usable_bytes
        in_flight = _in_flight(candidate, self._microbatches(candidate))
        ranks = [
            _Rank(model, flight, math.inf if limit is None else limit, candidate) for flight in in_flight
        ]
        ranks[0].holds(model.first_s, model.first_bytes)
        ranks[-1].holds(model.last_s, model.last_bytes)
        low = _slowest_rank_s(model, model.layer_s, candidate.pipeline)
        high = model.layers * (model.layer_s + model.again_s) + model.first_s + model.last_s
        if sum(rank.most_layers(high) for rank in ranks) < model.layers:
            return None
        while high - low > _EXACT * high:
            middle = (low + high) / 2
            if sum(rank.most_layers(middle) for rank in ranks) < model.layers:
                low = middle
            else:
                high = middle
        return Estimate(self._iteration_s(candidate, high), 0.0, candidate)

    def _model(self, candidate: Candidate) -> _Model:
        # Into how many chunks stages are cut changes no piece, but for whether batches may overlap.
        key = replace(candidate, chunks=min(candidate.chunks, 2))
        if key not in self._models:
            self._models[key] = self._summed(key)
        return self._models[key]

    def _microbatches(self, candidate: Candidate) -> int:
        samples = self._experiment.training.global_batch_size // candidate.data
        return samples // candidate.micro_batch_size

    def _iteration_s(self, candidate: Candidate, slowest_s: float) -> float:
        model, stages = self._model(candidate), candidate.pipeline
        whole_s = model.layers * model.layer_s + model.first_s + model.last_s
        filling_s = (stages - 1) * (whole_s / stages / candidate.chunks + 2 * model.transfer_s)
        return self._microbatches(candidate) * slowest_s + filling_s + model.after_s

    def _summed(self, candidate: Candidate) -> _Model:
        changed = with_candidate(self._experiment, candidate)
        layout = Layout.of(changed)
        units = self.units(candidate, changed, layout)
        pieces, layers = pieces_of(units), units.layers
        return _Model(
            layers=len(layers),
            layer_s=fmean(list(map(_seconds, layers))),
            again_s=fmean([unit.times.recompute_s for unit in layers]),
            layer_bytes=fmean([unit.memory.total for unit in layers]),
            kept_by_layer=fmean([unit.activations.kept for unit in layers]),
            saved_by_layer=fmean(
                [unit.activations.kept - unit.activations.kept_if_recomputed for unit in layers]
            ),
            first_s=_seconds(units.embedding),
            last_s=_seconds(units.head) + (_seconds(units.mtp) if units.mtp else 0.0),
            first_bytes=units.embedding.memory.total + units.embedding.activations.kept,
            last_bytes=sum(
                piece.memory.total + piece.activations.kept for piece in (units.head, units.mtp) if piece
            ),
            static_bytes=sum(piece.memory.total for piece in pieces),
            kept_bytes=sum(piece.activations.kept for piece in pieces),
            least_kept_bytes=sum(
                piece.activations.kept_if_recomputed if piece.kind in LAYERS else piece.activations.kept
                for piece in pieces
            ),
            transfer_s=units.transfer_s,
            after_s=self._after_s(changed, layout, units),
        )

    def units(self, candidate: Candidate, changed: Experiment, layout: Layout) -> Units:
        """What a rank holds of a piece follows from TP, EP, ETP and the replicas, that is PP; what it takes
        to run it from TP, CP, EP, ETP, the microbatch, what is computed again, and whether batches may
        overlap."""
        c = candidate
        held = (c.tensor, c.expert, c.expert_tensor, c.pipeline)
        may_overlap = c.pipeline == 1 or c.chunks > 1
        run = (c.tensor, c.context, c.expert, c.expert_tensor, c.micro_batch_size, c.recompute, may_overlap)
        return assemble(
            changed,
            layout,
            self._cluster,
            None,
            self._memories.setdefault(held, {}),
            self._running.setdefault(run, {}),
        )

    def _after_s(self, experiment: Experiment, layout: Layout, units: Units) -> float:
        """Each stage holding its part of all pieces."""
        pieces, stages = pieces_of(units), layout.pipeline_model_parallel_size
        held = {kind: count / stages for kind, count in Counter(piece.kind for piece in pieces).items()}
        forward_s = sum(piece.times.forward_s for piece in pieces) / stages
        backward_s = sum(piece.times.backward_s for piece in pieces) / stages
        return sum(timing.after_pieces(experiment, layout, self._cluster, held, forward_s, backward_s))


def _seconds(unit: Unit) -> float:
    return unit.times.forward_s + unit.times.backward_s


def _slowest_rank_s(model: _Model, layer_s: float, stages: int) -> float:
    """The slowest rank where the ranks hold whole layers."""
    if stages == 1:
        return model.layers * layer_s + model.first_s + model.last_s
    beside = sorted((model.first_s, model.last_s))

    def held(limit: float) -> int:
        """Layers that the ranks can hold within that time; -1 where one is slower without any."""
        if beside[-1] > limit:
            return -1
        ends = sum(int((limit - seconds) / layer_s + 1e-9) for seconds in beside)
        return (stages - 2) * int(limit / layer_s + 1e-9) + ends

    most = model.layers // stages + 2 + int(beside[-1] / layer_s)
    limits = sorted(count * layer_s + seconds for seconds in (0.0, *beside) for count in range(most))
    return next((limit for limit in limits if held(limit) >= model.layers), limits[-1])


def _in_flight(candidate: Candidate, microbatches: int) -> list[float]:
    """Microbatches whose activations each rank keeps; those of a chunk are a part of one."""
    stages, chunks = candidate.pipeline, candidate.chunks
    if chunks == 1:
        return [min(stages - rank, microbatches) for rank in range(stages)]
    passes = (2 * (stages - rank - 1) + (chunks - 1) * stages + 1 for rank in range(stages))
    return [min(count / chunks, microbatches) for count in passes]


class _Rank:
    """How many layers one pipeline rank can hold."""

    def __init__(self, model: _Model, in_flight: float, limit: float, candidate: Candidate) -> None:
        self._model, self._in_flight = model, in_flight
        self._may_recompute = candidate.recompute == "auto"
        self._seconds, self._free = 0.0, limit

    def holds(self, seconds: float, size: float) -> None:
        """Beside layers."""
        self._seconds += seconds
        self._free -= size

    def most_layers(self, seconds: float) -> int:
        """In its memory, where a microbatch may take so long."""
        model = self._model
        left = seconds - self._seconds
        if left < 0 or self._free < 0:
            return -model.layers
        layers = int(left / model.layer_s + 1e-9)
        by_layer = model.layer_bytes + self._in_flight * model.kept_by_layer
        while layers * by_layer > self._free:
            again = math.ceil((layers * by_layer - self._free) / (self._in_flight * model.saved_by_layer))
            if (
                self._may_recompute
                and again <= layers
                and layers * model.layer_s + again * model.again_s <= left
            ):
                break
            layers -= 1
        return layers
