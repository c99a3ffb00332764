"""Where layers go and how many are recomputed, so that every rank fits and an iteration is shortest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config.errors import InputError
from megatron_moe.plan.exact_search import fastest
from megatron_moe.plan.local_search import Candidates, improve, least_missing
from megatron_moe.plan.rank_choices import RankChoices
from megatron_moe.plan.units import Units


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


class NothingFits(InputError):
    """No placement fits the memory.

    Attributes:
        missing_bytes: of each pipeline rank, in the placement in which the worst rank misses least.
    """

    def __init__(self, message: str, missing_bytes: Sequence[float]) -> None:
        super().__init__(message)
        self.missing_bytes = tuple(missing_bytes)


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
) -> Placement:
    """The fastest placement that fits.

    Args:
        pipeline_size, chunks: PP and VPP.
        num_microbatches: of an iteration; with VPP a multiple of PP.
        memory_bytes: what a rank may use; None: not known, everything fits.
        fixed_layers: the layers of each stage where they are given.
        fixed_recompute: the recompute count of each pipeline rank where they are given.
        method: of recomputing whole layers, `block` or `uniform`.
        mtp_stage: the stage with the multi-token-prediction layers; None: the last.

    Raises NothingFits.
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
    candidates = Candidates(choices, pipeline_size, chunks, num_microbatches, units.transfer_s)
    start = candidates.even() if fixed_layers is None else tuple(fixed_layers)
    if fixed_layers is None:
        start = least_missing(candidates, start)
    if any(missing := candidates.missing(start)):
        raise NothingFits(f"needs {max(missing):.4g} bytes more", missing)
    if fixed_layers is not None or pipeline_size == 1:
        makespan = float(candidates.makespans([start])[0])
        return Placement(start, candidates.recompute(start), makespan, makespan)
    best = improve(candidates, start)
    best, bound = fastest(candidates, best)
    makespan = float(candidates.makespans([best])[0])
    return Placement(best, candidates.recompute(best), makespan, bound)
