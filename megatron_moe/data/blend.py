"""Several sources as one dataset, mixed by weights."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.data.order import Interleaving, SampleOrder
from megatron_moe.data.samples import Samples


@dataclass(frozen=True)
class Part:
    """What one source gives to the training or to the validation samples."""

    name: str
    samples: Samples
    weight: float
    """Share of the samples that come from here, in proportion to the others."""


class Blend:
    """The samples of all parts, one part after the other; `order` mixes them."""

    def __init__(self, parts: Sequence[Part], tell_source: bool = False) -> None:
        """`tell_source`: each sample also says in `by_source` [parts], float, where it comes from: 1 in one
        place."""
        self.parts = sorted(parts, key=lambda part: part.name)
        self._begins = [0, *itertools.accumulate(len(part.samples) for part in self.parts)]
        self._tell_source = tell_source

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source = bisect.bisect_right(self._begins, index) - 1
        sample = self.parts[source].samples[index - self._begins[source]]
        if not self._tell_source:
            return sample
        return {**sample, "by_source": torch.eye(len(self.parts))[source]}

    def order(self, seed: int, shuffle: bool) -> BlendOrder:
        """See `BlendOrder`."""
        return BlendOrder(self, seed, shuffle)

    def interleaving(self) -> Interleaving:
        """Which source each sample of a run comes from, as a place in `parts`."""
        return Interleaving([part.weight for part in self.parts])

    def begin(self, source: int) -> int:
        """Index of a source's first sample."""
        return self._begins[source]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples of a run go through each source."""
        taken = self.interleaving().taken(samples)
        return {part.name: count / len(part.samples) for part, count in zip(self.parts, taken, strict=True)}


class BlendOrder:
    """Sample i of a run, as an index into a blend: the source whose turn it is, and there the next sample of
    its own order."""

    def __init__(self, blend: Blend, seed: int, shuffle: bool) -> None:
        self._begins = [blend.begin(source) for source in range(len(blend.parts))]
        self._interleaving = blend.interleaving()
        self._orders = [SampleOrder(len(part.samples), seed, shuffle, part.name) for part in blend.parts]

    def __getitem__(self, index: int) -> int:
        source, place = self._interleaving[index]
        return self._begins[source] + self._orders[source][place]
