"""A better layout for an experiment on so many GPUs.

Each candidate (`search_space`) gets an estimate of its iteration (`search_estimate`), and what cannot fit
however much is computed again is left out. From the best estimate on, layers
and recomputation are placed and the schedule is simulated, until the estimates left are slower than the tenth
best iteration found.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, replace

from megatron_moe.config.errors import InputError
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import Experiment
from megatron_moe.plan import journeys
from megatron_moe.plan.assembly import assemble
from megatron_moe.plan.auto import placed
from megatron_moe.plan.forecast import Forecast
from megatron_moe.plan.forecasting import foretell
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.search.estimate import Estimate, Estimates
from megatron_moe.plan.search.space import Candidate, candidates, is_own, with_candidate
from megatron_moe.plan.stages import stages_of
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.wording import memory, plural

SHOWN = 10
_PLACED_AT_MOST = 48
"""Candidates whose layers are placed: an end for spaces whose estimates lie close together."""
_PROVED = 3
"""Of the layouts that are shown, as many get the fastest placement; the others one near it."""
_VARIANTS = 4
"""Of a layout that differ by chunks and recomputation only, as many are placed, from the best estimate on."""
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


def search(experiment: Experiment, gpus: int) -> Search:
    """The fastest layouts of a filled experiment on so many GPUs of `launch.cluster`.

    Raises InputError where nothing fits, with what is missing, and where no layout of so many ranks is
    allowed.
    """
    cluster = Cluster.of(experiment)
    of_candidates = Estimates(experiment, cluster)
    estimates = [
        of_candidates.at_first_sight(candidate)
        for candidate in candidates(experiment, gpus, cluster.gpus_per_node)
    ]
    if not estimates:
        raise InputError(
            f"training.global_batch_size = {experiment.training.global_batch_size}: no layout of {gpus} "
            "ranks divides it and the model's sizes; use another --gpus"
        )
    found = _Best(experiment, of_candidates)
    found.place([estimate for estimate in estimates if estimate.lacking_bytes <= 0])
    if not found.by_layout:
        nearest = min(estimates, key=lambda estimate: estimate.lacking_bytes)
        raise InputError(_nothing_fits(nearest, gpus, cluster))
    too_large = sum(estimate.lacking_bytes > 0 for estimate in estimates) + found.too_large
    return Search(tuple(found.prove()), len(estimates), too_large, found.placed)


class _Best:
    """The fastest candidates, as they are placed one after the other."""

    def __init__(self, experiment: Experiment, of_candidates: Estimates) -> None:
        self._experiment, self._estimates = experiment, of_candidates
        self.by_layout: dict[Candidate, Found] = {}
        """Of layouts that are alike but for chunks and recomputation the best one."""
        self.too_large = self.placed = 0
        self._variants: Counter[Candidate] = Counter()

    @property
    def fastest(self) -> list[Found]:
        return sorted(self.by_layout.values(), key=lambda one: one.forecast.iteration_s)

    def place(self, at_first_sight: list[Estimate]) -> None:
        """Look again at the fastest estimate, or place it when that was done, until the tenth best iteration
        is below all that are left. The experiment's own layout is placed before all others."""
        queue = [
            (0.0, estimate.candidate, True)
            if is_own(self._experiment, estimate.candidate)
            else (estimate.seconds, estimate.candidate, False)
            for estimate in at_first_sight
        ]
        heapq.heapify(queue)
        tenth = math.inf
        while queue and self.placed < _PLACED_AT_MOST:
            seconds, candidate, was_looked_at = heapq.heappop(queue)
            if seconds > tenth * _SLACK:
                return
            layout = replace(candidate, chunks=1, recompute="")
            if self._is_settled(layout, seconds):
                continue
            if not was_looked_at:
                estimate = self._estimates.at_second_sight(candidate)
                if estimate is None:
                    self.too_large += 1
                else:
                    heapq.heappush(queue, (max(seconds, estimate.seconds), candidate, True))
                continue
            self.placed += 1
            self._variants[layout] += 1
            self._keep(layout, _placed(self._experiment, candidate, prove=False))
            fastest = self.fastest
            tenth = fastest[SHOWN - 1].forecast.iteration_s if len(fastest) >= SHOWN else math.inf

    def _is_settled(self, layout: Candidate, seconds: float) -> bool:
        """Whether a variant with that estimate, or behind it, need not be placed."""
        best = self.by_layout.get(layout)
        return best is not None and (
            best.forecast.iteration_s <= seconds or self._variants[layout] >= _VARIANTS
        )

    def prove(self) -> list[Found]:
        """The ones that are shown, the first ones with the fastest placement that there is."""
        for one in self.fastest[:_PROVED]:
            self._keep(
                replace(one.candidate, chunks=1, recompute=""),
                _placed(self._experiment, one.candidate, prove=True),
            )
        return self.fastest[:SHOWN]

    def _keep(self, layout: Candidate, one: Found | None) -> None:
        if one is None:
            return
        other = self.by_layout.get(layout)
        if other is None or one.forecast.iteration_s < other.forecast.iteration_s:
            self.by_layout[layout] = one


def _placed(experiment: Experiment, candidate: Candidate, prove: bool) -> Found | None:
    """The candidate with its layers placed; None where it does not fit or a rule forbids it."""
    changed = with_candidate(experiment, candidate)
    if violations(changed):
        return None
    try:
        changed = placed(changed, None, prove)
    except InputError:
        return None
    layout, cluster = Layout.of(changed), Cluster.of(changed)
    units = assemble(changed, layout, cluster, None)
    forecast = foretell(changed, layout, stages_of(changed), units, cluster)
    dispatcher = None if changed.moe is None else journeys.choice(changed).dispatcher
    return Found(candidate, changed, forecast, dispatcher)


def _nothing_fits(nearest: Estimate, gpus: int, cluster: Cluster) -> str:
    c = nearest.candidate
    assert cluster.memory_bytes is not None
    lacks = nearest.lacking_bytes
    # Pieces spread evenly over the ranks may fit where whole layers do not.
    needs = (
        f"needs {memory(lacks)} more on each" if lacks > 0 else "has too little for whole layers on a rank"
    )
    return (
        f"launch.cluster.memory_gib = {cluster.memory_bytes / 2**30:g}: no layout of {plural(gpus, 'GPU')} "
        f"fits; the nearest, TP {c.tensor} PP {c.pipeline} CP {c.context} EP {c.expert}, all layers computed "
        f"again, {needs}; use more GPUs, or larger ones"
    )
