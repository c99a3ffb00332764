"""Normalisation that knows sequence parallelism and needs neither apex nor Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.engine.sharding import split_vectors


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `config.normalization` says.

    Under sequence parallelism each tensor-parallel rank sees a part of the sequence; the mark
    `sequence_parallel` on the parameters makes Megatron-Core sum their gradients over the tensor-parallel
    group. Its own wrapper refuses that case. The result has the parameters' dtype, also where the residual
    stream is kept in float32.

    Args:
        config: TransformerConfig.
        hidden_size: h.
        eps: added to the variance.

    Shape: [..., h] -> [..., h].
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(hidden_states.dtype)
        if self.bias is None:
            normed = torch.nn.functional.rms_norm(hidden_states, self.shape, weight, self.eps)
        else:
            bias = self.bias.to(hidden_states.dtype)
            normed = torch.nn.functional.layer_norm(hidden_states, self.shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


class NormOfAllHeads(torch.nn.Module):
    """RMSNorm of a token's queries, or keys, over all heads together (OLMoE), which tensor-parallel ranks
    share.

    Each rank adds up the squares of its own heads; the sum over all ranks, forward and backward, is two
    numbers a token.

    Args: as Megatron-Core's builders of norms of queries and keys.

    Shape: [s, b, n, d] -> [s, b, n, d], n heads of this tensor-parallel rank.

    Parameters:
        weight: [n * d].
    """

    heads: str
    """The field of TransformerConfig that says how many heads there are on all ranks."""

    def __init__(self, hidden_size: int, config: Any, eps: float, **kwargs: Any) -> None:
        super().__init__()
        from megatron.core import parallel_state

        self.eps, self.tensor_group = eps, parallel_state.get_tensor_model_parallel_group()
        self.width = hidden_size * getattr(config, self.heads)
        size, device = self.width // self.tensor_group.size(), torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
        marks = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
        for name, value in marks.items():
            setattr(self.weight, name, value)

    def forward(self, heads: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )

        exact = heads.flatten(2).to(torch.promote_types(heads.dtype, torch.float32))
        squares = reduce_from_tensor_model_parallel_region(
            exact.square().sum(-1, keepdim=True), group=self.tensor_group
        )
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tensor_group)
        normed = exact * torch.rsqrt(squares / self.width + self.eps) * self.weight
        return normed.to(heads.dtype).view_as(heads)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Where this rank's weights lie among those of all heads."""
        return split_vectors(self, prefix, sharded_offsets, metadata, self.tensor_group)


class NormOfQueries(NormOfAllHeads):
    """Of the queries."""

    heads = "num_attention_heads"


class NormOfKeys(NormOfAllHeads):
    """Of the keys."""

    heads = "num_query_groups"
