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
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Weight(NamedTuple):
    """What is known of a weight without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Protocol):
    """All weights of a model, read one at a time."""

    def inventory(self) -> Mapping[str, Weight]:
        """Every weight that is there, by name, in the order in which it is best read."""

    def read(self, name: str) -> Tensor:
        """A weight, in host memory, the caller's to change. KeyError for a name that the inventory lacks."""
