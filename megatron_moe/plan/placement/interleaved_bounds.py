"""Bounds of the makespan of interleaved 1F1B from what each rank has to run, where only the first stages are
known."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe.plan.placement.candidates import Candidates, Layers


class LoadBounds:
    """A rank runs all its passes one after the other: behind the forwards of the first microbatch through the
    ranks before it, and before the backwards of the last one there. What is computed again counts in
    `whole_layers` only.

    Attributes:
        beside_s: forward and backward of each stage without layers.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._layer_s = [
            layer.times.forward_s + layer.times.backward_s for layer in candidates.choices.units.layers
        ]
        size = candidates.pipeline_size
        self.beside_s: list[float] = []
        for stage in range(candidates.num_stages):
            empty = candidates.choices.with_count(stage % size, [range(0)] * candidates.chunks, 0)
            cost = empty.costs[stage // size]
            self.beside_s.append(cost.forward_s + cost.backward_s)

    def layers_s(self, first: int, behind: int) -> float:
        """Forward and backward through consecutive layers."""
        return sum(self._layer_s[first:behind])

    def empty_loads(self) -> list[float]:
        """Seconds of a microbatch on each rank before it has layers."""
        size = self._candidates.pipeline_size
        return [sum(self.beside_s[rank::size]) for rank in range(size)]

    def of_rank(self, before: Sequence[float], loads: Sequence[float], rank: int) -> float:
        """For one rank with that load.

        Args:
            before: of the layers of the first stages, by `before`.
        """
        return before[rank] + self._candidates.num_microbatches * loads[rank]

    def of_all(self, placed: Layers, before: Sequence[float], loads: Sequence[float]) -> float:
        """For the slowest rank, and for all of them on average with the layers that are left.

        Args:
            placed: layers of the first stages.
        """
        count = self._candidates.num_microbatches
        slowest = max(start + count * load for start, load in zip(before, loads, strict=True))
        left = self.layers_s(sum(placed), self._candidates.num_layers)
        return max(slowest, (sum(before) + count * (sum(loads) + left)) / len(loads))

    def whole_layers(self) -> float:
        """For any placement: a layer goes to one rank, none is faster than the fastest one. Layer by layer to
        the rank that is the least slow with it, the slowest rank is as fast as it can be."""
        candidates = self._candidates
        ranks = range(candidates.pipeline_size)
        least = [
            sum(candidates.least_of(stage) for stage in range(rank, candidates.num_stages, len(ranks)))
            for rank in ranks
        ]
        before = self.before(tuple(candidates.least_of(rank) for rank in ranks), min(self._layer_s))
        values = [
            [before[rank] + candidates.num_microbatches * load for load in self._loads(rank, least[rank])]
            for rank in ranks
        ]
        taken = [0] * len(ranks)
        for _ in range(candidates.num_layers - sum(least)):
            taken[min(ranks, key=lambda rank: values[rank][taken[rank] + 1])] += 1
        return max(values[rank][taken[rank]] for rank in ranks)

    def _loads(self, rank: int, least: int) -> list[float]:
        """Of a rank with `least` layers, one more, and so on to all."""
        candidates = self._candidates
        beside, fastest = self.empty_loads()[rank], min(self._layer_s)
        counts = range(least, candidates.num_layers + 1)
        alike = all(layer is candidates.choices.units.layers[0] for layer in candidates.choices.units.layers)
        if not alike or candidates.chunks != 2:
            return [beside + count * fastest for count in counts]
        return [self._fastest_split(rank, count) for count in counts]

    def _fastest_split(self, rank: int, count: int) -> float:
        """Of so many equal layers over two chunks, with recomputation that fits; infinite if none does."""
        choices = (
            self._candidates.choices.choice(rank, [range(one), range(count - one)])
            for one in range(count + 1)
        )
        loads = (choice.both_s for choice in choices if not choice.missing_bytes)
        return min(loads, default=float("inf"))

    def before(self, placed: Layers, layer_s: float | None = None) -> list[float]:
        """For each rank, what passes before its first one and behind its last one take at least.

        Args:
            layer_s: of each layer; None: of those that are placed.
        """
        before, first = [0.0], 0
        for rank in range(self._candidates.pipeline_size - 1):
            seconds = 2 * self._candidates.transfer_s + self.beside_s[rank]
            if rank < len(placed):
                behind = first + placed[rank]
                layers = self.layers_s(first, behind) if layer_s is None else placed[rank] * layer_s
                seconds, first = seconds + layers, behind
            before.append(before[-1] + seconds)
        return before
