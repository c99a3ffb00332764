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

    A layer with a sliding window sees that many tokens, its own the last; `config.window_size` counts those
    before it, as Megatron-Core's.

    Documents that must not see each other come as `attention_mask`, which Megatron-Core hands through all
    layers and recomputes with: not as a mask of s x s, but as their lengths.

    Under tensor parallelism each rank drops attention of its own heads, so that it draws from the
    tensor-parallel random state (Megatron-Core runs the whole block in that state under sequence parallelism,
    and only there).

    Args: as Megatron-Core's core attention builders.

    Parameters:
        softmax_offset: [n], only where `config.softmax_type` is learnable: a logit of each head that takes
        part in the softmax and brings nothing (gpt-oss). Named as in Megatron-Core's own.

    Shape: query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]; n heads, g groups of this
    tensor-parallel rank.
    """

    softmax_offset: torch.nn.Parameter | None

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
        self.window = _window(config, layer_number)
        self.tensor_group: Any = pg_collection.tp if pg_collection is not None else None
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            device = torch.cuda.current_device()
            sinks = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
            for name, value in {
                "tensor_model_parallel": True,
                "partition_dim": 0,
                "partition_stride": 1,
            }.items():
                setattr(sinks, name, value)
            self.softmax_offset = sinks

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
        scores: Any = {
            "scale": self.scale,
            "dropout": dropout,
            "window": self.window,
            "sinks": self.softmax_offset,
        }
        with self._random_state(dropout):
            if attention_mask is None:
                # [s, b, n, d] -> [b, n, s, d]
                parts = [
                    attend(*(x.permute(1, 2, 0, 3) for x in part), **scores).permute(2, 0, 1, 3)
                    for part in zip(queries, keys, values, strict=True)
                ]
                context = torch.cat(parts) if len(parts) > 1 else parts[0]
            else:
                tokens = attend_segments(
                    *(flatten(x) for x in (queries, keys, values)),
                    segments=attention_mask,
                    **scores,
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

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Where this rank's sinks lie among those of all heads."""
        if self.softmax_offset is None:
            return {}
        from megatron_moe.engine.sharding import split_vectors

        return split_vectors(self, prefix, sharded_offsets, metadata, self.tensor_group)


def _window(config: Any, layer_number: int) -> int | None:
    """Tokens that each token of this layer sees, counted from 1; None: all before it."""
    from megatron.core.transformer.utils import is_layer_window_attention

    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    before: int = config.window_size[0]
    return before + 1
