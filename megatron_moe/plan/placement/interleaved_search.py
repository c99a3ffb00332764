"""The fastest placement over the stages of interleaved 1F1B: all placements are tried that a bound does not
rule out, as far as there are few enough of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from megatron_moe.plan.placement.candidates import TIE, Candidates, Layers
from megatron_moe.plan.placement.interleaved_bounds import LoadBounds

_AT_ONCE = 1024
_PASSES = 1e7
"""To simulate, times placements, before the search gives up its proof: about a second."""
_STEPS = 50_000
"""To go from one placement to the next before it gives up."""


def fastest_interleaved(candidates: Candidates, known: Layers) -> tuple[Layers, float]:
    """The fastest placement, and the makespan that none falls below: its own, unless the search gave up.

    Args:
        known: a placement that fits; the better it is, the shorter the search.
    """
    best, shortest = known, float(candidates.makespans([known])[0])
    bounds = LoadBounds(candidates)
    bound = max(bounds.of_all((), bounds.before(()), bounds.empty_loads()), bounds.whole_layers())
    if bound >= shortest * (1 - TIE):
        return best, shortest
    search = _Enumeration(candidates, bounds, shortest)
    found = search.placements()
    left = _PASSES / (2 * candidates.num_stages * candidates.simulated)
    while left > 0 and (batch := list(islice(found, _AT_ONCE))):
        left -= len(batch)
        spans = candidates.makespans(batch)
        least = int(spans.argmin())
        if spans[least] < shortest * (1 - TIE):
            best, shortest = batch[least], float(spans[least])
            search.limit = shortest
    return best, shortest if search.is_complete else min(bound, shortest)


class _Enumeration:
    """All placements that fit and may take less than the limit."""

    def __init__(self, candidates: Candidates, bounds: LoadBounds, limit: float) -> None:
        self.limit = limit
        self.is_complete = False
        self._candidates = candidates
        self._bounds = bounds
        self._steps = _STEPS

    def placements(self) -> Iterator[Layers]:
        """One after the other; `is_complete` is set behind the last."""
        yield from self._from((), 0, self._bounds.empty_loads())
        self.is_complete = self._steps > 0

    def _from(self, placed: Layers, first: int, loads: list[float]) -> Iterator[Layers]:
        """Those that begin with these stages.

        Args:
            first: the first layer that is left.
            loads: seconds of a microbatch on each rank.
        """
        candidates, stage = self._candidates, len(placed)
        rank, last = stage % candidates.pipeline_size, candidates.num_stages - 1
        if stage == last:
            counts = range(candidates.num_layers - first, candidates.num_layers - first + 1)
        else:
            behind = sum(map(candidates.least_of, range(stage + 1, last)))
            counts = range(candidates.least_of(stage), candidates.num_layers - first - behind + 1)
        for count in counts:
            self._steps -= 1
            if self._steps <= 0:
                return
            more = self._bounds.layers_s(first, first + count)
            now = [*loads[:rank], loads[rank] + more, *loads[rank + 1 :]]
            here = (*placed, count)
            before = self._bounds.before(here)
            # With more layers the rank is slower yet; of all ranks together that need not be so.
            if self._bounds.of_rank(before, now, rank) >= self.limit * (1 - TIE):
                return
            if self._bounds.of_all(here, before, now) >= self.limit * (1 - TIE):
                continue
            if stage < last:
                yield from self._from(here, first + count, now)
            elif not any(candidates.missing(here)):
                yield here
