"""Placements of layers on the stages of a layout: which are allowed, what ranks lack, how long they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron_moe.plan.placement.rank_choices import RankChoice, RankChoices
from megatron_moe.plan.schedules.long_iterations import SIMULATED_WHOLE
from megatron_moe.plan.schedules.many import makespans
from megatron_moe.plan.schedules.orders import ScheduleName

if TYPE_CHECKING:
    from megatron_moe.plan.schedules.many import Seconds

Layers = tuple[int, ...]
"""Layers of each stage, in token order."""

_ROUNDS = 4
"""Each with PP microbatches of an interleaved schedule: so many tell which placement is better."""

_OF_LONG = 1024
"""Of so many microbatches that no pass is left out (`SIMULATED_WHOLE`), about these are simulated."""

TIE = 1e-9
"""Makespans that differ by less, relatively, are equal: rounding."""


class Candidates:
    """The placements under one layout; recompute counts follow from them."""

    def __init__(self, choices: RankChoices, num_microbatches: int) -> None:
        self.choices = choices
        self.pipeline_size = choices.pipeline_size
        self.chunks = choices.chunks
        self.num_stages = choices.num_stages
        self.num_layers = len(choices.units.layers)
        self.num_microbatches = num_microbatches
        self.simulated = num_microbatches
        """Microbatches; the others count at the pace of the slowest ranks."""
        if self.is_long:
            self.simulated = max(_OF_LONG // self.pipeline_size, 2 * _ROUNDS) * self.pipeline_size
        self.transfer_s = choices.units.transfer_s if self.pipeline_size > 1 else 0.0
        self.schedule: ScheduleName = "1f1b" if self.chunks == 1 else "interleaved"

    @property
    def is_long(self) -> bool:
        """Whether an iteration has more microbatches than are simulated."""
        return self.num_microbatches > SIMULATED_WHOLE

    def shortened(self) -> Candidates:
        """The same with the microbatches that are simulated."""
        return Candidates(self.choices, self.simulated)

    def with_choices(self, choices: RankChoices) -> Candidates:
        """The same for ranks under other conditions."""
        return Candidates(choices, self.num_microbatches)

    def least_of(self, stage: int) -> int:
        """The fewest layers that a stage may hold: those between the first and the last hold one at least."""
        return int(0 < stage < self.num_stages - 1)

    def even(self) -> Layers:
        """As even as can be, earlier stages with more where it is not."""
        left = self.num_layers - sum(map(self.least_of, range(self.num_stages)))
        assert left >= 0, "there are layers for all stages between the first and the last"
        counts = [self.least_of(stage) for stage in range(self.num_stages)]
        for _ in range(left):
            counts[counts.index(min(counts))] += 1
        return tuple(counts)

    def balanced(self) -> Layers:
        """As even over the ranks' times, and over the chunks of each, as whole layers that fit allow; all
        taken to be as the last one."""
        layer = self.num_layers - 1
        held = [self._spread(rank, 0) for rank in range(self.pipeline_size)]
        for _ in range(self.num_layers - sum(map(sum, held))):
            more = [self._spread(rank, sum(held[rank]) + 1) for rank in range(self.pipeline_size)]
            values = []
            for rank, counts in enumerate(more):
                choice = self.choices.choice(
                    rank, [range(self.num_layers - count, layer + 1) for count in counts]
                )
                values.append((choice.missing_bytes, choice.both_s, rank))
            rank = min(values)[-1]
            held[rank] = more[rank]
        return tuple(
            held[stage % self.pipeline_size][stage // self.pipeline_size] for stage in range(self.num_stages)
        )

    def _spread(self, rank: int, count: int) -> list[int]:
        """So many layers over the chunks of a rank, at least as many as its stages must hold."""
        counts = [self.least_of(stage) for stage in range(rank, self.num_stages, self.pipeline_size)]
        for _ in range(count - sum(counts)):
            counts[counts.index(min(counts))] += 1
        return counts

    def ranks(self, layers: Layers) -> list[RankChoice]:
        """The choice of each rank."""
        if self.chunks == 1:
            ends = list(accumulate(layers, initial=0))
            return list(map(self.choices.of_stage, range(self.num_stages), ends, ends[1:]))
        if self.choices.are_alike:
            size = self.pipeline_size
            return [self.choices.of_counts(rank, layers[rank::size]) for rank in range(size)]
        held, first = [], 0
        for count in layers:
            held.append(range(first, first + count))
            first += count
        return [
            self.choices.choice(rank, held[rank :: self.pipeline_size]) for rank in range(self.pipeline_size)
        ]

    def missing(self, layers: Layers) -> tuple[float, ...]:
        """Bytes that each rank lacks."""
        return tuple(choice.missing_bytes for choice in self.ranks(layers))

    def recompute(self, layers: Layers) -> tuple[int, ...]:
        """The recompute count of each rank."""
        return tuple(choice.recompute for choice in self.ranks(layers))

    def recompute_s(self, layers: Layers) -> float:
        """What one microbatch's recomputation takes, on all stages together."""
        return sum(cost.recompute_s for choice in self.ranks(layers) for cost in choice.costs)

    def may_take(self, layers: Layers, longest_s: float) -> bool:
        """Whether a placement fits and may be no longer than that: a rank runs its passes one after the
        other, behind the first microbatch's forwards before it, and before the last one's backwards there."""
        before = 0.0
        for choice in self.ranks(layers):
            if choice.missing_bytes or before + self.num_microbatches * choice.both_s > longest_s:
                return False
            before += choice.costs[0].forward_s + choice.costs[0].backward_s + 2 * self.transfer_s
        return True

    def makespans(self, placements: Sequence[Layers]) -> Seconds:
        """Of each placement."""
        return self._spans(placements, self.simulated)

    def estimates(self, placements: Sequence[Layers]) -> Seconds:
        """The makespans; those of an interleaved schedule with many microbatches from one with fewer, the
        others at the slowest rank's pace."""
        fewer = self.simulated
        if self.chunks > 1:
            fewer = min(fewer, _ROUNDS * self.pipeline_size)
        return self._spans(placements, fewer)

    def _spans(self, placements: Sequence[Layers], simulated: int) -> Seconds:
        """Makespans, of which so many microbatches are simulated and the others take the slowest's pace."""
        forward, backward = self._seconds(placements)
        spans = makespans(self.schedule, forward, backward, self.pipeline_size, simulated, self.transfer_s)
        if simulated < self.num_microbatches:
            pace = self._pace(forward + backward)
            if self.is_long and self.chunks > 1:
                # Transfers may be what is waited for, round after round.
                half = simulated // self.pipeline_size // 2 * self.pipeline_size
                begun = makespans(self.schedule, forward, backward, self.pipeline_size, half, self.transfer_s)
                pace = (spans - begun) / (simulated - half)
            spans = spans + (self.num_microbatches - simulated) * pace
        return spans

    def _pace(self, both: Seconds) -> Seconds:
        """Seconds of a microbatch on the slowest rank; of 1F1B also of neighbours that wait for each other,
        in turn, with the transfers between.

        Args:
            both: forward and backward of each stage: [stages, placements].
        """
        import numpy as np

        pace: Seconds = both.reshape(self.chunks, self.pipeline_size, -1).sum(axis=0).max(axis=0)
        if self.chunks == 1 and self.transfer_s:
            before = np.vstack([np.zeros_like(both[:1]), np.cumsum(both, axis=0)])
            for together in range(2, self.pipeline_size + 1):
                around = before[together:] - before[:-together] + 2 * (together - 1) * self.transfer_s
                np.maximum(pace, around.max(axis=0) / together, out=pace)
        return pace

    def _seconds(self, placements: Sequence[Layers]) -> tuple[Seconds, Seconds]:
        """Forward and backward of each stage: [stages, placements]."""
        import numpy as np

        forward = np.empty((self.num_stages, len(placements)))
        backward = np.empty_like(forward)
        for column, layers in enumerate(placements):
            for rank, choice in enumerate(self.ranks(layers)):
                for chunk, cost in enumerate(choice.costs):
                    forward[chunk * self.pipeline_size + rank, column] = cost.forward_s
                    backward[chunk * self.pipeline_size + rank, column] = cost.backward_s
        return forward, backward

    def neighbours(self, layers: Layers) -> Iterator[Layers]:
        """Those with one layer more on one stage and one less on another."""
        for giver in range(self.num_stages):
            if layers[giver] == self.least_of(giver):
                continue
            for taker in range(self.num_stages):
                if giver != taker:
                    moved = list(layers)
                    moved[giver] -= 1
                    moved[taker] += 1
                    yield tuple(moved)
