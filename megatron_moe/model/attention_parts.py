"""What a model's attention has around its core, and Megatron-Core's config no field for."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def biased(linear: type[torch.nn.Module], has_bias: bool) -> type[torch.nn.Module]:
    """A class of linear layers of Megatron-Core with a bias, or without, whatever the config says of all."""

    class Linear(linear):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=has_bias, **kwargs)

    return _named(Linear, linear)


@cache
def clipped(attention: type[torch.nn.Module], limit: float) -> type[torch.nn.Module]:
    """A class of self-attention whose queries, keys and values are clamped to `limit`, behind their norms and
    before they are rotated (OLMoE)."""

    class Attention(attention):  # type: ignore[misc, valid-type]
        def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            tensors = super().get_query_key_value_tensors(*args, **kwargs)
            return tuple(tensor.clamp(-limit, limit) for tensor in tensors)

    return _named(Attention, attention)


def _named(made: type[torch.nn.Module], after: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Megatron-Core asks some of its classes for their names."""
    made.__name__, made.__qualname__ = after.__name__, after.__qualname__
    return made
