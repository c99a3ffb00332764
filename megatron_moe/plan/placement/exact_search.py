"""The fastest placement of layers over the stages of 1F1B, by branch and bound: stage after stage from the
first one, all placements at once that no bound rules out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_moe.plan.placement.candidates import TIE, Candidates, Layers
from megatron_moe.plan.placement.stage_options import StageOptions, at, cycles_between, options_of, rests_of
from megatron_moe.plan.schedules.many import Rest, bounds, makespans

if TYPE_CHECKING:
    from megatron_moe.plan.placement.stage_options import Numbers
    from megatron_moe.plan.schedules.many import Seconds

_AT_ONCE = 2048
_EFFORT = 4e8
"""Passes times placements to simulate before the search gives up its proof: some seconds."""


@dataclass(frozen=True)
class _Open:
    """Placements of the first stages that may lead to a faster one: columns."""

    ends: Numbers
    """[stages, placements]: the layer behind each stage."""
    forward_s: Seconds
    backward_s: Seconds
    bound_s: Seconds


def fastest(candidates: Candidates, known: Layers) -> tuple[Layers, float]:
    """The fastest placement, and the makespan that none falls below: its own, unless the search gave up.

    Args:
        known: a placement that fits; the better it is, the shorter the search.
    """
    import numpy as np

    shortest = float(candidates.makespans([known])[0])
    # A rank runs all its passes one after the other, so that no part is longer, but for rounding.
    options = options_of(candidates, shortest / candidates.num_microbatches * (1 + TIE))
    rests = rests_of(
        options,
        candidates.num_microbatches,
        candidates.transfer_s,
        _cycles(candidates, options, shortest),
    )
    best, effort = known, 0.0
    nothing = np.empty((0, 1))
    root = _Open(nothing.astype(np.int64), nothing, nothing, rests[0].own[:1])
    stack = [root]
    while stack:
        here = stack.pop()
        here = _subset(here, np.flatnonzero(here.bound_s < shortest * (1 - TIE)))
        if not len(here.bound_s):
            continue
        if effort > _EFFORT:
            stack.append(here)
            break
        stage = len(here.ends)
        below = _expanded(here, options[stage])
        if stage == candidates.num_stages - 2:
            below = _expanded(below, options[-1])
            spans = makespans(
                "1f1b",
                below.forward_s,
                below.backward_s,
                candidates.num_stages,
                candidates.num_microbatches,
                candidates.transfer_s,
            )
            effort += 2 * spans.size * candidates.num_microbatches * candidates.num_stages
            least = int(spans.argmin())
            if spans[least] < shortest * (1 - TIE):
                shortest = float(spans[least])
                best = tuple(int(n) for n in np.diff(below.ends[:, least], prepend=0))
            continue
        below = _bounded(candidates, below, rests[stage + 1])
        effort += 2 * below.bound_s.size * candidates.num_microbatches * (stage + 1)
        order = np.argsort(below.bound_s, kind="stable")
        order = order[below.bound_s[order] < shortest * (1 - TIE)]
        stack += [_subset(below, order[i : i + _AT_ONCE]) for i in range(0, len(order), _AT_ONCE)][::-1]
    proved = min((float(here.bound_s.min()) for here in stack), default=shortest)
    return best, min(shortest, proved)


def _cycles(candidates: Candidates, options: list[StageOptions], shortest: float) -> Seconds:
    """Cycle times up to that which the known makespan leaves room for."""
    least = min(float(table.both_s.min()) for table in options if len(table.first))
    return cycles_between(options, least, shortest / candidates.num_microbatches * (1 + TIE))


def _subset(here: _Open, which: Numbers) -> _Open:
    return _Open(
        here.ends[:, which], here.forward_s[:, which], here.backward_s[:, which], here.bound_s[which]
    )


def _expanded(here: _Open, table: StageOptions) -> _Open:
    """Each placement with each option of the next stage."""
    import numpy as np

    first = here.ends[-1] if len(here.ends) else np.zeros(len(here.bound_s), dtype=np.int64)
    counts = table.begin[first + 1] - table.begin[first]
    parent = np.repeat(np.arange(len(first)), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    option = table.begin[first][parent] + np.arange(len(parent)) - before
    return _Open(
        np.vstack([here.ends[:, parent], table.following[option]]),
        np.vstack([here.forward_s[:, parent], table.forward_s[option]]),
        np.vstack([here.backward_s[:, parent], table.backward_s[option]]),
        here.bound_s[parent],
    )


def _bounded(candidates: Candidates, here: _Open, rest: Rest) -> _Open:
    """With better bounds."""
    import numpy as np

    bound = bounds(
        here.forward_s,
        here.backward_s,
        candidates.num_stages,
        candidates.num_microbatches,
        candidates.transfer_s,
        at(rest, here.ends[-1]),
    )
    return _Open(here.ends, here.forward_s, here.backward_s, np.maximum(bound, here.bound_s))
