"""The fastest placement over the stages of interleaved 1F1B: all placements are tried that a bound does not
rule out, as far as there are few enough of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from megatron_moe.plan.candidates import TIE, Candidates, Layers

_AT_ONCE = 1024
_EFFORT = 3e7
"""Passes times placements to simulate, and steps to enumerate them, before the search gives up its proof."""
_STEPS_A_PASS = 100


def fastest_interleaved(candidates: Candidates, known: Layers) -> tuple[Layers, float]:
    """The fastest placement, and the makespan that none falls below: its own, unless the search gave up.

    Args:
        known: a placement that fits; the better it is, the shorter the search.
    """
    best, shortest = known, float(candidates.makespans([known])[0])
    bound = _root_bound(candidates)
    if bound >= shortest * (1 - TIE):
        return best, shortest
    search = _Enumeration(candidates, shortest)
    passes = 2 * candidates.num_stages * candidates.num_microbatches
    most = int(_EFFORT / passes)
    found = search.placements()
    while most > 0 and (batch := list(islice(found, _AT_ONCE))):
        most -= len(batch)
        spans = candidates.makespans(batch)
        least = int(spans.argmin())
        if spans[least] < shortest * (1 - TIE):
            best, shortest = batch[least], float(spans[least])
            search.limit = shortest
    return best, shortest if search.is_complete else min(bound, shortest)


class _Enumeration:
    """All placements that fit and may take less than the limit."""

    def __init__(self, candidates: Candidates, limit: float) -> None:
        self.limit = limit
        self.is_complete = False
        self._steps = int(_EFFORT / _STEPS_A_PASS)
        self._candidates = candidates
        size, stages = candidates.pipeline_size, candidates.num_stages
        units = candidates.choices.units
        self._layer_s = [layer.times.forward_s + layer.times.backward_s for layer in units.layers]
        self._beside_s = [0.0] * stages
        for stage in range(stages):
            empty = candidates.choices.with_count(stage % size, [range(0)] * candidates.chunks, 0)
            cost = empty.costs[stage // size]
            self._beside_s[stage] = cost.forward_s + cost.backward_s

    def placements(self) -> Iterator[Layers]:
        """One after the other; `is_complete` is set behind the last."""
        loads = [
            sum(self._beside_s[rank :: self._candidates.pipeline_size])
            for rank in range(self._candidates.pipeline_size)
        ]
        yield from self._from((), 0, loads)
        self.is_complete = self._steps > 0

    def _from(self, layers: Layers, first: int, loads: list[float]) -> Iterator[Layers]:
        """Those that begin with these stages. loads: seconds of a microbatch on each rank, without what is
        computed again, all that stands beside layers included."""
        candidates = self._candidates
        stage, last = len(layers), candidates.num_stages - 1
        rank = stage % candidates.pipeline_size
        behind = sum(map(candidates.least_of, range(stage + 1, last + 1)))
        counts = range(candidates.least_of(stage), candidates.num_layers - first - behind + 1)
        if stage == last:
            counts = range(candidates.num_layers - first, candidates.num_layers - first + 1)
        for count in counts:
            self._steps -= 1
            if self._steps <= 0:
                return
            mine = self._layer_s[first : first + count]
            now = [*loads[:rank], loads[rank] + sum(mine), *loads[rank + 1 :]]
            placed = (*layers, count)
            if self._least(placed, now, first + count) >= self.limit * (1 - TIE):
                # With one more layer it takes longer yet on this rank, but another may take less.
                if self._alone(placed, now, rank) >= self.limit * (1 - TIE):
                    return
                continue
            if stage < last:
                yield from self._from(placed, first + count, now)
            elif not any(candidates.missing(placed)):
                yield placed

    def _before(self, placed: Layers) -> list[float]:
        """For each rank, what the first microbatch takes there and the last one back through the ranks before
        it, as far as they are known."""
        size, hop = self._candidates.pipeline_size, 2 * self._candidates.transfer_s
        before, first, total = [0.0], 0, 0.0
        for rank in range(size - 1):
            total += hop + self._beside_s[rank]
            if rank < len(placed):
                total += sum(self._layer_s[first : first + placed[rank]])
                first += placed[rank]
            before.append(total)
        return before

    def _alone(self, placed: Layers, loads: list[float], rank: int) -> float:
        """A rank runs all its passes one after the other."""
        return self._before(placed)[rank] + self._candidates.num_microbatches * loads[rank]

    def _least(self, placed: Layers, loads: list[float], first: int) -> float:
        """The makespan at least: of the slowest rank, and of all on average with the layers that are left."""
        before, count = self._before(placed), self._candidates.num_microbatches
        each = max(a + count * load for a, load in zip(before, loads, strict=True))
        left = sum(self._layer_s[first:])
        return max(each, (sum(before) + count * (sum(loads) + left)) / len(loads))


def _root_bound(candidates: Candidates) -> float:
    """As for an enumeration's first step."""
    search = _Enumeration(candidates, 0.0)
    size = candidates.pipeline_size
    loads = [sum(search._beside_s[rank::size]) for rank in range(size)]
    return search._least((), loads, 0)
