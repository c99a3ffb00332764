"""For each stage of a pipeline with one stage a rank: which layers it may hold, what that costs, and what the
stages behind it cost at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_moe.plan.placement.candidates import Candidates
from megatron_moe.plan.schedules.many import Rest, bounds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron_moe.plan.schedules.many import Seconds

    Numbers = NDArray[np.int64]

_CYCLES = 128
"""Cycle times between which the least possible one is looked for."""
_FEW = 2
"""With up to so many microbatches a stage, what a pipeline's first and last ones cost counts: it is simulated
for the stages left, too."""


@dataclass(frozen=True)
class StageOptions:
    """The options of one stage that fit its memory: columns, sorted by the first layer.

    Attributes:
        first, following: the stage's first layer, and that of the next stage.
        forward_s, backward_s: with as many recomputed layers as the memory asks for.
        begin: [layers + 2]: the options with first layer n are those from begin[n] to begin[n + 1].
    """

    first: Numbers
    following: Numbers
    forward_s: Seconds
    backward_s: Seconds
    begin: Numbers

    @property
    def both_s(self) -> Seconds:
        return self.forward_s + self.backward_s


def options_of(candidates: Candidates, slowest_s: float) -> list[StageOptions]:
    """The options of each stage with forward and backward in no more than that, from which a way leads to the
    first and the last layer."""
    import numpy as np

    num_layers, num_stages = candidates.num_layers, candidates.num_stages
    rows: list[list[tuple[int, int, float, float]]] = []
    reached = {0}
    for stage in range(num_stages):
        found = []
        for first in sorted(reached):
            for following in range(first + candidates.least_of(stage), num_layers + 1):
                choice = candidates.choices.of_stage(stage, first, following)
                cost = choice.costs[0]
                if cost.forward_s + cost.backward_s - cost.recompute_s > slowest_s:
                    break
                if not choice.missing_bytes and cost.forward_s + cost.backward_s <= slowest_s:
                    found.append((first, following, cost.forward_s, cost.backward_s))
        rows.append(found)
        reached = {following for _, following, _, _ in found}
    goal = {num_layers}
    for stage in reversed(range(num_stages)):
        rows[stage] = [row for row in rows[stage] if row[1] in goal]
        goal = {row[0] for row in rows[stage]}
    tables = []
    for found in rows:
        first_layers = np.array([row[0] for row in found], dtype=np.int64)
        tables.append(
            StageOptions(
                first=first_layers,
                following=np.array([row[1] for row in found], dtype=np.int64),
                forward_s=np.array([row[2] for row in found]),
                backward_s=np.array([row[3] for row in found]),
                begin=np.searchsorted(first_layers, np.arange(num_layers + 2)),
            )
        )
    return tables


def least_slowest(candidates: Candidates, slowest_s: float) -> float:
    """Seconds of a microbatch on the slowest rank of the placement in which that is least.

    Args:
        slowest_s: as much as in a placement that is known, at least.
    """
    import numpy as np

    least = np.full(candidates.num_layers + 1, np.inf)
    least[candidates.num_layers] = 0.0
    for table in reversed(options_of(candidates, slowest_s)):
        least = _least(table, np.maximum(table.both_s, least[table.following]))
    return float(least[0])


def rests_of(
    options: list[StageOptions], num_microbatches: int, transfer_s: float, cycles: Seconds
) -> list[Rest]:
    """For each stage, and the end: bounds of it and the stages behind it, one for each first layer; infinite
    where no way leads on.

    Each bound is the least over the ways to place the layers that are left, each number by itself.

    Args:
        cycles: rising cycle times; `Rest.cycle` is the largest of them that no way is faster than.
    """
    import numpy as np

    num_layers = len(options[0].begin) - 2
    depth = len(options)
    infinite = np.full(num_layers + 1, np.inf)
    at_end = infinite.copy()
    at_end[num_layers] = 0.0
    rests = [Rest(at_end, at_end, at_end, at_end, np.full((depth, num_layers + 1), np.inf))]
    rests[0].walks[:, num_layers] = -np.inf
    # What the worst run of neighbours that ends at the stage takes beyond the cycle times.
    excess = np.full((len(cycles), num_layers + 1), np.inf)
    excess[:, num_layers] = 0.0
    for table in reversed(options):
        behind = rests[-1]
        is_last = len(rests) == 1
        hop = 0.0 if is_last else 2 * transfer_s
        both = table.both_s
        through = both + hop + behind.through[table.following]
        slowest = np.maximum(table.forward_s, table.backward_s)
        stay = np.maximum(slowest, behind.stay[table.following])
        if is_last:
            own = num_microbatches * both
        elif num_microbatches > _FEW * len(options):
            own = through + (num_microbatches - 1) * stay
        else:
            own = bounds(
                table.forward_s[None],
                table.backward_s[None],
                len(rests),
                num_microbatches,
                transfer_s,
                at(behind, table.following),
            )
        walks = _walks(both, behind.walks[:, table.following] + hop)
        excess = np.maximum(excess[:, table.following], 0) + both + 2 * transfer_s - cycles[:, None]
        excess[excess >= 2 * transfer_s - 1e-12 * cycles[:, None]] = np.inf
        excess = _least(table, excess)
        # The first cycle time that can be undercut; the one before it cannot.
        undercut = np.isfinite(excess)
        position = np.where(undercut.any(axis=0), undercut.argmax(axis=0), len(cycles)) - 1
        cycle = np.where(position >= 0, cycles[np.maximum(position, 0)], 0.0)
        least = [_least(table, values) for values in (own, through, stay, walks)]
        rests.append(Rest(least[0], least[1], least[2], cycle, least[3]))
    return rests[::-1]


def at(rest: Rest, layers: Numbers) -> Rest:
    """The bounds for those first layers."""
    return Rest(
        rest.own[layers], rest.through[layers], rest.stay[layers], rest.cycle[layers], rest.walks[:, layers]
    )


def _walks(both: Seconds, inner: Seconds) -> Seconds:
    """`Rest.walks` with a stage of these times before `inner`: [w, options]. A path goes round in the stage,
    or through it and the stages behind it, time after time."""
    import numpy as np

    longest = len(inner)
    once = np.vstack([both[None], both + inner[: longest - 1]])
    walks = once.copy()
    for w in range(1, longest):
        np.maximum(walks[w], (once[:w] + walks[:w][::-1]).max(axis=0), out=walks[w])
    return walks


def _least(table: StageOptions, values: Seconds) -> Seconds:
    """The least over the options of each first layer: [..., layers + 1]."""
    import numpy as np

    result = np.full((*values.shape[:-1], len(table.begin) - 1), np.inf)
    present = np.unique(table.first)
    if len(present):
        result[..., present] = np.minimum.reduceat(values, table.begin[present], axis=-1)
    return result


def cycles_between(options: list[StageOptions], least: float, most: float) -> Seconds:
    """Cycle times to try: those of single stages, and others evenly between."""
    import numpy as np

    single = np.concatenate([table.both_s for table in options])
    tried = np.concatenate([single[(single >= least) & (single <= most)], np.linspace(least, most, _CYCLES)])
    spread = np.unique(tried)
    result: Seconds = spread[np.append(True, np.diff(spread) > 1e-9 * most)]
    return result
