"""Core attention on torch's scaled_dot_product_attention, with context parallelism."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class CoreAttention(torch.nn.Module):
    """softmax(Q K^T * scale) V with a causal mask, fused by torch on every device.

    Stands where Megatron-Core's layer spec has `core_attention`; its own DotProductAttention is unfused and
    knows no context parallelism. Under context parallelism each rank holds two chunks of the sequence, r and
    2 CP - 1 - r (Megatron-Core's zig-zag split, which balances the causal work); keys and values are gathered
    over the group and masked by position.

    Under tensor parallelism each rank drops attention of its own heads, so that it draws from the
    tensor-parallel random state (Megatron-Core runs the whole block in that state under sequence parallelism,
    and only there).

    Args: as Megatron-Core's core attention builders.

    Shape: query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]; n heads, g groups of this
    tensor-parallel rank.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.context_group: Any = pg_collection.cp if pg_collection is not None else None
        self.context_size = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert packed_seq_params is None and attention_bias is None
        mask = None
        if self.context_size > 1:
            key, value = self._gather(key), self._gather(value)
            mask = self._causal_mask(query.size(0), query.device)
        # [s, b, n, d] -> [b, n, s, d]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            context = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=self.scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _random_state(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        """Where dropout is drawn from, if there is any."""
        if dropout == 0.0 or self.sequence_parallel:
            return contextlib.nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        state: contextlib.AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return state

    def _gather(self, x: Tensor) -> Tensor:
        """[s / CP, ...] of each rank -> [s, ...] in the order of the ranks' chunks."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        return gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=True, group=self.context_group
        )

    def _causal_mask(self, local_length: int, device: torch.device) -> Tensor:
        """[s / CP, s], true where a query of this rank may look at a gathered key."""
        chunk = local_length // 2
        within = torch.arange(chunk, device=device)
        chunks = [c for rank in range(self.context_size) for c in (rank, 2 * self.context_size - 1 - rank)]
        positions = torch.cat([within + chunk * c for c in chunks])
        own = positions.view(self.context_size, local_length)[self.context_group.rank()]
        return own[:, None] >= positions[None, :]
