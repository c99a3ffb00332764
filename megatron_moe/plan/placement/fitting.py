"""Whether any placement fits the memory; if not, what is missing, and what would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb

from megatron_moe.config.errors import InputError
from megatron_moe.plan.placement.candidates import Candidates, Layers
from megatron_moe.plan.placement.local_search import least_missing
from megatron_moe.plan.wording import memory, plural

_TIMES = (2, 3, 4, 6, 8)
"""By which PP is raised to see whether the model fits then."""
_TRIED = 2_000
"""So many placements of an interleaved schedule are tried one by one where small changes lead to none that
fits."""


class NothingFits(InputError):
    """No placement fits the memory.

    Attributes:
        missing_bytes: of each pipeline rank, in the placement in which the ranks lack least.
        pipeline_size: with which, and as many replicas, there is one that fits; None: none was found.
        recompute: counts a pipeline rank with which that placement fits; None where there are none.
    """

    def __init__(
        self,
        *problems: str,
        missing_bytes: Sequence[float] = (),
        pipeline_size: int | None = None,
        recompute: Sequence[int] | None = None,
    ) -> None:
        super().__init__(*problems)
        self.missing_bytes = tuple(missing_bytes)
        self.pipeline_size = pipeline_size
        self.recompute = None if recompute is None else tuple(recompute)


def fitting(candidates: Candidates) -> Layers | None:
    """A placement that fits (VPP above 1: not every one that does is found)."""
    fits = [layers for layers in _near(candidates) if not any(candidates.missing(layers))]
    if fits:
        return min(fits, key=lambda layers: float(candidates.estimates([layers])[0]))
    if candidates.chunks == 1:
        return _any_that_fits(candidates)
    if _number(candidates) > _TRIED:
        return None
    return next((layers for layers in _all_of(candidates, ()) if not any(candidates.missing(layers))), None)


def least_lacking(candidates: Candidates) -> Layers:
    """Where none fits, that in which the fullest rank lacks least (VPP above 1: about least)."""
    if candidates.chunks == 1:
        return _least_on_fullest(candidates)
    tried = _number(candidates) <= _TRIED
    found = list(_all_of(candidates, ())) if tried else _near(candidates)
    return min(found, key=lambda layers: max(candidates.missing(layers)))


def _near(candidates: Candidates) -> list[Layers]:
    """Those that small changes lead to."""
    return [least_missing(candidates, start) for start in (candidates.balanced(), candidates.even())]


def _number(candidates: Candidates) -> int:
    """Of all placements."""
    last = candidates.num_stages - 1
    free = candidates.num_layers - sum(map(candidates.least_of, range(last)))
    return comb(free + last, last)


def _all_of(candidates: Candidates, placed: Layers) -> Iterator[Layers]:
    """Every placement that begins so."""
    stage, left = len(placed), candidates.num_layers - sum(placed)
    if stage == candidates.num_stages - 1:
        yield (*placed, left)
        return
    behind = sum(map(candidates.least_of, range(stage + 1, candidates.num_stages)))
    for count in range(candidates.least_of(stage), left - behind + 1):
        yield from _all_of(candidates, (*placed, count))


def _any_that_fits(candidates: Candidates) -> Layers | None:
    """By dynamic programming from the last stage, on each of which as few layers as do."""
    num_layers, last = candidates.num_layers, candidates.num_stages - 1
    reach = [sum(map(candidates.least_of, range(stage))) for stage in range(last + 2)]
    behind: dict[int, Layers] = {num_layers: ()}
    for stage in range(last, -1, -1):
        here: dict[int, Layers] = {}
        for first in range(reach[stage], num_layers + 1) if stage else (0,):
            for end in range(first + candidates.least_of(stage), num_layers + 1):
                if end not in behind:
                    continue
                # More layers than the first that lead on need more memory.
                if not candidates.choices.of_stage(stage, first, end).missing_bytes:
                    here[first] = (end - first, *behind[end])
                break
        behind = here
    return behind.get(0)


def _least_on_fullest(candidates: Candidates) -> Layers:
    """By dynamic programming from the last stage: the least that the fullest of it and those behind lacks."""
    num_layers, last = candidates.num_layers, candidates.num_stages - 1
    reach = [sum(map(candidates.least_of, range(stage))) for stage in range(last + 2)]
    behind: dict[int, tuple[float, Layers]] = {num_layers: (0.0, ())}
    for stage in range(last, -1, -1):
        here: dict[int, tuple[float, Layers]] = {}
        for first in range(reach[stage], num_layers + 1) if stage else (0,):
            ways = [
                (max(candidates.choices.of_stage(stage, first, end).missing_bytes, lacks), end, layers)
                for end, (lacks, layers) in behind.items()
                if end - first >= candidates.least_of(stage)
            ]
            if ways:
                lacks, end, layers = min(ways)
                here[first] = (lacks, (end - first, *layers))
        behind = here
    return behind[0][1]


def nothing_fits(candidates: Candidates, nearest: Layers, *, has_fixed_layers: bool) -> NothingFits:
    """The error, for the placement in which least is missing."""
    missing = candidates.missing(nearest)
    fullest = missing.index(max(missing))
    where = f"stage {fullest}" if candidates.chunks == 1 else f"pipeline rank {fullest}"
    pipeline_size = None if has_fixed_layers else _larger(candidates)
    recompute = _recompute(candidates, nearest)
    would_do = [] if pipeline_size is None else [f"PP={pipeline_size} (with as many replicas)"]
    if recompute is not None:
        would_do.append(f"recompute of {plural(recompute[fullest], 'layer')} there")
    raised = "TP or EP" if any(layer.kind == "moe" for layer in candidates.choices.units.layers) else "TP"
    ends = " or ".join(would_do) + " would do" if would_do else f"raise {raised}, or lower micro_batch_size"
    return NothingFits(
        f"launch.cluster.memory_gib: the model needs {memory(missing[fullest])} more on {where}; {ends}",
        missing_bytes=missing,
        pipeline_size=pipeline_size,
        recompute=recompute,
    )


def _larger(candidates: Candidates) -> int | None:
    """The PP that fits, if all pieces cost the same there."""
    for times in _TIMES:
        size = times * candidates.pipeline_size
        if size * candidates.chunks > candidates.num_layers + 2:
            return None
        if candidates.chunks > 1 and candidates.num_microbatches % size:
            continue
        larger = candidates.with_choices(candidates.choices.on(size))
        if not any(larger.missing(least_missing(larger, larger.even()))):
            return size
    return None


def _recompute(candidates: Candidates, nearest: Layers) -> tuple[int, ...] | None:
    """Counts with which the same placement fits, where they were given and others do."""
    if candidates.choices.fixed_recompute is None:
        return None
    free = candidates.with_choices(candidates.choices.with_free_recompute())
    return None if any(free.missing(nearest)) else free.recompute(nearest)
