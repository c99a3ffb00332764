"""The weights of a model under names that no layout, storage or spec changes.

A name is that of Megatron-Core's checkpoint with the number of the layer and of the expert in it, both
counted over the whole model:

    embedding.word_embeddings.weight                                [padded v, h]
    decoder.layers.3.self_attention.linear_qkv.layer_norm_weight    [h]
    decoder.layers.3.self_attention.linear_qkv.weight               [(n + 2 g) d, h]
    decoder.layers.3.mlp.linear_fc1.weight                          [2 f, h]
    decoder.layers.3.mlp.router.weight                              [e, h]
    decoder.layers.3.mlp.experts.7.linear_fc1.weight                [2 f, h]
    mtp.layers.0.transformer_layer.mlp.experts.7.linear_fc2.weight  [h, f]
    output_layer.weight                                             [padded v, h]

linear_qkv goes group by group: the queries of its heads, its key, its value. linear_fc1 of a gated activation
has the gate's rows before those of the up-projection.

In a checkpoint layers of one kind, and experts, are stacked to one tensor, whose key has no numbers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Weight(NamedTuple):
    """What is known of a weight without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights(Protocol):
    """All weights of a model, read one at a time."""

    def inventory(self) -> Mapping[str, Weight]:
        """Every weight that is there, by name, in the order in which it is best read."""

    def read(self, name: str) -> Tensor:
        """A weight, in host memory, the caller's to change. KeyError for a name that the inventory lacks."""


_OF_A_MODEL = ("embedding.", "decoder.", "mtp.", "output_layer.")
_NOT_TRAINED = re.compile(r"\._extra_state|\.(alpha|done|previous_fractions)$")
"""What Transformer Engine keeps beside its weights, and where balancing losses have come to."""
_STACKED_LAYERS = re.compile(r"^(decoder|mtp)\.layers\.(?!\d)")
_STACKED_EXPERTS = ".experts.experts."


def holds_weights(key: str) -> bool:
    """Whether what a checkpoint has under `key` are weights, not states of optimizers, losses and the
    like."""
    return key.startswith(_OF_A_MODEL) and _NOT_TRAINED.search(key) is None


def stacked_axes(key: str) -> int:
    """How many leading dimensions of a checkpoint's tensor count layers and experts."""
    return bool(_STACKED_LAYERS.match(key)) + (_STACKED_EXPERTS in key)


def name_of(key: str, place: Sequence[int]) -> str:
    """The name of the matrix at `place` in the leading dimensions of a checkpoint's tensor."""
    numbers = iter(place)
    if _STACKED_LAYERS.match(key):
        key = _STACKED_LAYERS.sub(rf"\1.layers.{next(numbers)}.", key)
    if _STACKED_EXPERTS in key:
        key = key.replace(_STACKED_EXPERTS, f".experts.{next(numbers)}.")
    return key


def names_in(
    key: str, shape: Sequence[int], begin: Sequence[int] = ()
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Place and name of each matrix in a checkpoint's tensor, or in a block of it.

    Args:
        shape: of the tensor, or the block.
        begin: where in the tensor the block begins. Default: at its beginning.
    """
    axes = stacked_axes(key)
    begin = tuple(begin[:axes]) or (0,) * axes
    for place in itertools.product(
        *(range(at, at + size) for at, size in zip(begin, shape[:axes], strict=True))
    ):
        yield place, name_of(key, place)
