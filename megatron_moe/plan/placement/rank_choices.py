"""What a pipeline rank costs with given layers, and as few recomputed ones as fit its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.plan.schedules.in_flight import peaks
from megatron_moe.plan.schedules.orders import ScheduleName
from megatron_moe.plan.stage_units import StageCost, stage_cost
from megatron_moe.plan.units import Units

_BEHIND_MTP = 2.0**60
"""Bytes that a layer behind multi-token prediction is said to lack: none can be there."""


@dataclass(frozen=True)
class RankChoice:
    """One rank with its layers and its recompute count."""

    recompute: int
    """What Megatron-Core is told."""
    costs: tuple[StageCost, ...]
    """Of each chunk."""
    missing_bytes: float
    """What it needs beyond the memory; 0 where it fits."""
    both_s: float
    """Forward and backward of a microbatch through all chunks."""


class RankChoices:
    """The costs of ranks under one layout; equal questions are answered once.

    Args:
        memory_bytes: for all that a rank holds; None: enough.
        fixed_recompute: the recompute count of each rank; None: free.
        method: `block` or `uniform`.
        mtp_stage: the stage with the multi-token-prediction layers.
    """

    def __init__(
        self,
        units: Units,
        *,
        pipeline_size: int,
        chunks: int,
        num_microbatches: int,
        memory_bytes: float | None,
        fixed_recompute: Sequence[int] | None,
        method: str,
        mtp_stage: int | None,
    ) -> None:
        self.units = units
        self.pipeline_size = pipeline_size
        self.chunks = chunks
        self.num_stages = pipeline_size * chunks
        self.num_microbatches = num_microbatches
        self.fixed_recompute = fixed_recompute
        self._memory_bytes = memory_bytes
        self._method = method
        self._mtp_stage = self.num_stages - 1 if mtp_stage is None else mtp_stage
        schedule: ScheduleName = "1f1b" if chunks == 1 else "interleaved"
        self._in_flight = [
            peaks(schedule, rank, pipeline_size, chunks, num_microbatches) for rank in range(pipeline_size)
        ]
        known = list({id(layer): layer for layer in units.layers}.values())
        self._kinds = bytes(known.index(layer) for layer in units.layers)
        self._costs: dict[tuple[bytes, int, bool, bool, bool], StageCost] = {}
        self._choices: dict[tuple[int, tuple[bytes, ...]], RankChoice] = {}
        self._of_stage: dict[tuple[int, int, int], RankChoice] = {}
        self._of_counts: dict[tuple[int, tuple[int, ...]], RankChoice] = {}
        self.are_alike = len(known) == 1
        """Whether all layers cost the same, so that their numbers do not matter."""

    def choice(self, rank: int, held: Sequence[range]) -> RankChoice:
        """The least recompute count with which the rank fits, else the one with which least is missing.

        More recomputed layers make no pass faster, so the least count that fits is as good as any.

        Args:
            held: the layers of each chunk.
        """
        key = (rank, tuple(self._kinds[layers.start : layers.stop] for layers in held))
        if key not in self._choices:
            self._choices[key] = self._find(rank, held)
        return self._choices[key]

    def of_stage(self, stage: int, first: int, behind: int) -> RankChoice:
        """`choice` of a rank with one chunk, by the first layer and that of the next stage."""
        key = (stage, first, behind)
        found = self._of_stage.get(key)
        if found is None:
            found = self._of_stage[key] = self.choice(stage, [range(first, behind)])
        return found

    def of_counts(self, rank: int, counts: tuple[int, ...]) -> RankChoice:
        """`choice` where layers are alike, by how many of them each chunk holds."""
        key = (rank, counts)
        found = self._of_counts.get(key)
        if found is None:
            found = self._of_counts[key] = self.choice(rank, [range(count) for count in counts])
        return found

    def with_free_recompute(self) -> RankChoices:
        """The same with the recompute counts free."""
        return self._with(self.pipeline_size, None)

    def on(self, pipeline_size: int) -> RankChoices:
        """The same pieces on another number of ranks; recompute counts are free if any layer was recomputed,
        else there are none again."""
        none = self.fixed_recompute is not None and not any(self.fixed_recompute)
        return self._with(pipeline_size, [0] * pipeline_size if none else None)

    def _with(self, pipeline_size: int, fixed_recompute: Sequence[int] | None) -> RankChoices:
        return RankChoices(
            self.units,
            pipeline_size=pipeline_size,
            chunks=self.chunks,
            num_microbatches=self.num_microbatches,
            memory_bytes=self._memory_bytes,
            fixed_recompute=fixed_recompute,
            method=self._method,
            # From the end: it is the last stage or the one before it.
            mtp_stage=self._mtp_stage - self.num_stages + pipeline_size * self.chunks,
        )

    def _find(self, rank: int, held: Sequence[range]) -> RankChoice:
        if self.fixed_recompute is not None:
            return self.with_count(rank, held, self.fixed_recompute[rank])
        best = self.with_count(rank, held, 0)
        for count in range(1, max(len(layers) for layers in held) + 1):
            if not best.missing_bytes:
                break
            other = self.with_count(rank, held, count)
            if other.missing_bytes < best.missing_bytes:
                best = other
        return best

    def with_count(self, rank: int, held: Sequence[range], count: int) -> RankChoice:
        """The rank with a given recompute count."""
        costs = tuple(
            self._cost(chunk * self.pipeline_size + rank, layers, count) for chunk, layers in enumerate(held)
        )
        both_s = sum(cost.forward_s + cost.backward_s for cost in costs)
        astray = 0
        if self.units.mtp is not None and rank > self._mtp_stage % self.pipeline_size:
            astray = len(held[-1])
        if self._memory_bytes is None:
            return RankChoice(count, costs, astray * _BEHIND_MTP, both_s)
        kept = max(
            sum(number * cost.kept_bytes for number, cost in zip(moment, costs, strict=True))
            for moment in self._in_flight[rank]
        )
        needed = sum(cost.memory.total for cost in costs) + kept + max(cost.working_bytes for cost in costs)
        missing = max(0.0, needed - self._memory_bytes) + astray * _BEHIND_MTP
        return RankChoice(count, costs, missing, both_s)

    def _cost(self, stage: int, layers: range, count: int) -> StageCost:
        ends = (stage == 0, stage == self.num_stages - 1, stage == self._mtp_stage)
        key = (self._kinds[layers.start : layers.stop], count, *ends)
        if key not in self._costs:
            is_first, is_last, has_mtp = ends
            self._costs[key] = stage_cost(
                self.units,
                layers,
                method=self._method,
                count=count,
                is_first=is_first,
                is_last=is_last,
                has_mtp=has_mtp,
            )
        return self._costs[key]
