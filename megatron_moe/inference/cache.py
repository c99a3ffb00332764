"""Keys and values of the tokens so far, of all layers of this rank."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.inference.step import Step


class Cache:
    """Room for some sequences of some length.

    Each layer stores what it likes of a token in `kept` tensors [slots, length, ..], which are made when it
    stores for the first time: keys and values [g, d] of this rank's heads, or the latent of multi-latent
    attention, which all heads share.

    Args:
        slots: sequences at once.
        length: tokens of each.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        self._places: tuple[Step, Tensor] | None = None

    def store(self, layer: int, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep tensors [t, ..] of the tokens of a step. Returns everything that is kept of the layer, each
        [slots, length, ..]."""
        if layer not in self.kept:
            shape = (self.slots, self.length)
            self.kept[layer] = tuple(x.new_zeros(*shape, *x.shape[1:]) for x in tensors)
        places = self._places_of(step)
        for kept, x in zip(self.kept[layer], tensors, strict=True):
            kept.flatten(0, 1).index_copy_(0, places, x)
        return self.kept[layer]

    @torch.inference_mode()  # as what stores: its tensors may not be changed outside
    def move(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of the sequence in slot `source` into slot `target`."""
        for kept in self.kept.values():
            for x in kept:
                x[target, :length] = x[source, :length]

    @property
    def bytes_used(self) -> int:
        """On this rank."""
        return sum(x.nbytes for kept in self.kept.values() for x in kept)

    def _places_of(self, step: Step) -> Tensor:
        """[t] rows of the flattened [slots * length]; the same for all layers."""
        if self._places is None or self._places[0] is not step:
            self._places = step, step.slots * self.length + step.positions
        return self._places[1]
