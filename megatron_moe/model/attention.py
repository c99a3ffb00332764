"""Core attention on torch's scaled_dot_product_attention, with context parallelism and documents."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from megatron_moe.engine.segments import chunks_of_rank
from megatron_moe.model.causal import attend, attend_segments, flatten, unflatten


class CoreAttention(torch.nn.Module):
    """softmax(Q K^T * scale) V, causal, fused by torch on every device.

    Stands where Megatron-Core's layer spec has `core_attention`; its own DotProductAttention is unfused and
    knows no context parallelism. Under context parallelism each rank holds two chunks of the sequence, r and
    2 CP - 1 - r (Megatron-Core's zig-zag split, which balances the causal work); keys and values are gathered
    over the group, and each chunk attends to the sequence up to its end.

    Documents that must not see each other come as `attention_mask`, which Megatron-Core hands through all
    layers and recomputes with: not as a mask of s x s, but as their lengths.

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
        """`attention_mask`: None, or where documents must not see each other the segments [m, 2] of
        `engine.segments`."""
        assert packed_seq_params is None and attention_bias is None
        queries, keys, values = [query], [key], [value]
        if self.context_size > 1:
            queries = list(query.chunk(2))
            keys, values = self._seen(key), self._seen(value)
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            if attention_mask is None:
                # [s, b, n, d] -> [b, n, s, d]
                parts = [
                    attend(*(x.permute(1, 2, 0, 3) for x in part), scale=self.scale, dropout=dropout).permute(
                        2, 0, 1, 3
                    )
                    for part in zip(queries, keys, values, strict=True)
                ]
                context = torch.cat(parts) if len(parts) > 1 else parts[0]
            else:
                tokens = attend_segments(
                    *(flatten(x) for x in (queries, keys, values)),
                    segments=attention_mask,
                    scale=self.scale,
                    dropout=dropout,
                )
                context = unflatten(tokens, queries)
        return context.reshape(query.size(0), query.size(1), -1)

    def _random_state(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        """Where dropout is drawn from, if there is any."""
        if dropout == 0.0 or self.sequence_parallel:
            return contextlib.nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        state: contextlib.AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return state

    def _seen(self, x: Tensor) -> list[Tensor]:
        """[s / CP, ...] of each rank -> for each chunk of this rank what its last position sees: the sequence
        up to there."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        gathered = gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=True, group=self.context_group
        )
        chunks = gathered.chunk(2 * self.context_size)  # in the order of the ranks
        order = [c for rank in range(self.context_size) for c in chunks_of_rank(rank, self.context_size)]
        in_sequence = [chunks[order.index(c)] for c in range(len(order))]
        return [
            torch.cat(in_sequence[: c + 1])
            for c in chunks_of_rank(self.context_group.rank(), self.context_size)
        ]
