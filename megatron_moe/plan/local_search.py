"""Placements, their makespans, and better ones next to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_moe.plan.rank_choices import RankChoice, RankChoices
from megatron_moe.plan.schedules.many import makespans
from megatron_moe.plan.schedules.orders import ScheduleName

if TYPE_CHECKING:
    from megatron_moe.plan.schedules.many import Seconds

Layers = tuple[int, ...]
"""Layers of each stage, in token order."""

_TIE = 1e-9
"""Makespans that differ by less, relatively, are equal: rounding."""


class Candidates:
    """Placements under one layout."""

    def __init__(
        self,
        choices: RankChoices,
        pipeline_size: int,
        chunks: int,
        num_microbatches: int,
        transfer_s: float,
    ) -> None:
        self.choices = choices
        self.pipeline_size = pipeline_size
        self.num_stages = pipeline_size * chunks
        self.num_layers = len(choices.units.layers)
        self.num_microbatches = num_microbatches
        self.transfer_s = transfer_s if pipeline_size > 1 else 0.0
        self.schedule: ScheduleName = "1f1b" if chunks == 1 else "interleaved"

    def even(self) -> Layers:
        """As even as can be, the earlier stages with more where it is not."""
        each, more = divmod(self.num_layers, self.num_stages)
        return tuple(each + (stage < more) for stage in range(self.num_stages))

    def is_allowed(self, layers: Layers) -> bool:
        """Stages between the first and the last hold a layer at least."""
        return min(layers) >= 0 and all(layers[1:-1])

    def ranks(self, layers: Layers) -> list[RankChoice]:
        """The choice of each rank."""
        starts = [0]
        for count in layers:
            starts.append(starts[-1] + count)
        held = [range(starts[stage], starts[stage + 1]) for stage in range(self.num_stages)]
        return [
            self.choices.choice(rank, held[rank :: self.pipeline_size]) for rank in range(self.pipeline_size)
        ]

    def missing(self, layers: Layers) -> tuple[float, ...]:
        """Bytes that each rank lacks."""
        return tuple(choice.missing_bytes for choice in self.ranks(layers))

    def recompute(self, layers: Layers) -> tuple[int, ...]:
        """The recompute count of each rank."""
        return tuple(choice.recompute for choice in self.ranks(layers))

    def makespans(self, placements: Sequence[Layers]) -> Seconds:
        """Of each placement."""
        import numpy as np

        forward = np.empty((self.num_stages, len(placements)))
        backward = np.empty_like(forward)
        for column, layers in enumerate(placements):
            for rank, choice in enumerate(self.ranks(layers)):
                for chunk, cost in enumerate(choice.costs):
                    forward[chunk * self.pipeline_size + rank, column] = cost.forward_s
                    backward[chunk * self.pipeline_size + rank, column] = cost.backward_s
        return makespans(
            self.schedule, forward, backward, self.pipeline_size, self.num_microbatches, self.transfer_s
        )

    def neighbours(self, layers: Layers) -> Iterator[Layers]:
        """One layer moved from one stage to another; layers between move up."""
        for giver in range(self.num_stages):
            for taker in range(self.num_stages):
                moved = list(layers)
                moved[giver] -= 1
                moved[taker] += 1
                if giver != taker and self.is_allowed(tuple(moved)):
                    yield tuple(moved)


def least_missing(candidates: Candidates, start: Layers) -> Layers:
    """A placement that fits, or in which ranks lack no more bytes than in those next to it."""
    best, least = start, sum(candidates.missing(start))
    while least:
        found = min(
            candidates.neighbours(best), key=lambda other: sum(candidates.missing(other)), default=best
        )
        if (now := sum(candidates.missing(found))) >= least:
            break
        best, least = found, now
    return best


def improve(candidates: Candidates, start: Layers) -> Layers:
    """A placement that fits, of which none next to it is faster; of equally fast ones a more even one."""

    def unevenness(layers: Layers) -> int:
        return sum(count * count for count in layers)

    best, shortest = start, float(candidates.makespans([start])[0])
    while True:
        others = [other for other in candidates.neighbours(best) if not any(candidates.missing(other))]
        if not others:
            return best
        spans = candidates.makespans(others)
        at = min(range(len(others)), key=lambda i: (round(spans[i] / shortest, 9), unevenness(others[i]), i))
        faster = spans[at] < shortest * (1 - _TIE)
        if not faster and not (
            spans[at] <= shortest * (1 + _TIE) and unevenness(others[at]) < unevenness(best)
        ):
            return best
        best, shortest = others[at], float(spans[at])
