"""Where layers go and how many are recomputed, so that every rank fits and an iteration is shortest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.plan.placement.candidates import TIE, Candidates, Layers
from megatron_moe.plan.placement.exact_search import fastest
from megatron_moe.plan.placement.fitting import NothingFits, fitting, least_lacking, nothing_fits
from megatron_moe.plan.placement.interleaved_bounds import LoadBounds
from megatron_moe.plan.placement.interleaved_search import fastest_interleaved
from megatron_moe.plan.placement.local_search import improve
from megatron_moe.plan.placement.rank_choices import RankChoices
from megatron_moe.plan.placement.stage_options import least_slowest
from megatron_moe.plan.units import Units

__all__ = ["NothingFits", "Placement", "place"]

_PROVABLE = 500
"""Layers up to which a proof is tried: the table of a stage's options has the square of that."""


@dataclass(frozen=True)
class Placement:
    """What was found."""

    layers_per_stage: tuple[int, ...]
    """In the order in which a token passes the PP x VPP stages."""
    recompute_per_rank: tuple[int, ...]
    """What Megatron-Core is told on each pipeline rank."""
    makespan_s: float
    """Of the simulated schedule."""
    bound_s: float
    """No placement is faster; the makespan itself where the placement is proved to be the fastest."""

    @property
    def gap(self) -> float:
        """By which part of the makespan a placement might be faster; 0 where none is."""
        return 1 - self.bound_s / self.makespan_s if self.makespan_s else 0.0


def place(
    units: Units,
    *,
    pipeline_size: int,
    chunks: int,
    num_microbatches: int,
    memory_bytes: float | None,
    fixed_layers: Sequence[int] | None,
    fixed_recompute: Sequence[int] | None,
    method: str,
    mtp_stage: int | None,
    prove: bool = True,
) -> Placement:
    """The fastest placement that fits; of equally fast ones one with little recomputation, and even.

    Args:
        pipeline_size, chunks: PP and VPP.
        num_microbatches: of an iteration; with VPP above 1 a multiple of PP.
        memory_bytes: what a rank may use; None: not known, everything fits.
        fixed_layers: the layers of each stage where they are given.
        fixed_recompute: the recompute count of each pipeline rank where they are given.
        method: of recomputing whole layers, `block` or `uniform`.
        mtp_stage: the stage with the multi-token-prediction layers; None: the last.
        prove: search until nothing can be faster, or until the time for it is over; False: be content with
            what small changes don't make faster, for a search over many layouts.

    Raises NothingFits, where it is to prove with what is missing and what would do.
    """
    choices = RankChoices(
        units,
        pipeline_size=pipeline_size,
        chunks=chunks,
        num_microbatches=num_microbatches,
        memory_bytes=memory_bytes,
        fixed_recompute=fixed_recompute,
        method=method,
        mtp_stage=mtp_stage,
    )
    candidates = Candidates(choices, num_microbatches)
    start = fitting(candidates) if fixed_layers is None else tuple(fixed_layers)
    if start is None and not prove:
        raise NothingFits("no placement fits the memory")
    start = least_lacking(candidates) if start is None else start
    if any(candidates.missing(start)):
        raise nothing_fits(candidates, start, has_fixed_layers=fixed_layers is not None)
    best, bound = start, None
    if fixed_layers is None and pipeline_size > 1:
        best, bound = _fastest(candidates, start) if prove else (improve(candidates, start), 0.0)
    makespan = float(candidates.makespans([best])[0])
    return Placement(best, candidates.recompute(best), makespan, makespan if bound is None else bound)


def _fastest(candidates: Candidates, start: Layers) -> tuple[Layers, float]:
    near = improve(candidates, start)
    if candidates.num_layers > _PROVABLE:
        return near, _least_s(candidates)
    if candidates.is_long and candidates.chunks == 1:
        return _fastest_of_long(candidates, near)
    search = fastest if candidates.chunks == 1 else fastest_interleaved
    best, bound = search(candidates, near)
    # Of equally fast ones the search takes whichever it meets first.
    return (best if best == near else improve(candidates, best)), bound


def _fastest_of_long(candidates: Candidates, near: Layers) -> tuple[Layers, float]:
    """From the fastest placement of a shorter iteration; no one has a faster slowest rank than the bound."""
    found, _ = fastest(candidates.shortened(), near)
    both = [near, improve(candidates, found)]
    spans = candidates.makespans(both)
    best = both[int(spans.argmin())]
    pace_s = least_slowest(candidates, float(spans.min()) / candidates.num_microbatches * (1 + TIE))
    return best, min(candidates.num_microbatches * pace_s, float(spans.min()))


def _least_s(candidates: Candidates) -> float:
    """A bound of the makespan without a search."""
    bounds = LoadBounds(candidates)
    loads, count = bounds.empty_loads(), candidates.num_microbatches
    mean = bounds.of_all((), bounds.before(()), loads)
    if candidates.chunks > 1:
        return mean
    # Each rank runs all its passes behind the first microbatch's forwards before it, and before the last
    # one's backwards there: up to rank r there are S(r) <= makespan / count + (1 - 1 / count) S(r - 1)
    # seconds.
    whole = sum(loads) + bounds.layers_s(0, candidates.num_layers)
    return max(mean, float(whole / (1 - (1 - 1 / count) ** candidates.pipeline_size)))
