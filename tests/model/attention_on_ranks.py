"""Run on ranks: core attention under context and tensor parallelism."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.engine import groups
from megatron_moe.engine.segments import segments
from megatron_moe.model.attention import CoreAttention
from megatron_moe.plan.layout import Layout


def settings(**fields: Any) -> SimpleNamespace:
    """What core attention reads of a TransformerConfig."""
    plain = {
        "attention_dropout": 0.0,
        "sequence_parallel": False,
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "window_size": None,
        "window_attn_skip_freq": None,
        "softmax_type": "vanilla",
        "params_dtype": torch.float64,
    }
    return SimpleNamespace(**plain | fields)


def build(parallel: dict[str, int], **config: Any) -> CoreAttention:
    """Core attention in this rank's groups."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    sizes = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        **parallel,
    }
    groups.initialize_model_parallel(Layout(**sizes), seed=5, timeout_s=60)
    here = settings(
        context_parallel_size=sizes["context_parallel_size"],
        tensor_model_parallel_size=sizes["tensor_model_parallel_size"],
        **config,
    )
    return CoreAttention(here, 1, None, "self", pg_collection=ProcessGroupCollection.use_mpu_process_groups())


def under_context(
    size: int,
    inputs: list[Tensor],
    upstream: Tensor,
    kv_channels: int,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> list[Tensor]:
    """This rank's part, chunks r and 2 CP - 1 - r, of output and gradients; `inputs` and `upstream` are
    whole, and so is `starts` [b, s], where documents begin. With `sinks` also its part of their gradient."""
    config: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}
    if sinks is not None:
        config |= {"softmax_type": "learnable", "num_attention_heads": len(sinks)}
    attention = build({"context_parallel_size": size}, kv_channels=kv_channels, **config)
    if attention.softmax_offset is not None and sinks is not None:
        attention.softmax_offset.data = sinks
    rank = torch.distributed.get_rank()

    def mine(x: Tensor) -> Tensor:
        chunks = x.chunk(2 * size)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]) if size > 1 else x

    leaves = [mine(x).detach().clone().requires_grad_() for x in inputs]
    output = attention(*leaves, None if starts is None else segments(starts, rank, size))
    output.backward(mine(upstream))
    leaves += attention.parameters()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def dropped(sequence_parallel: bool, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Under TP: the same heads through dropout twice, then in evaluation; and what the default state draws
    next."""
    attention = build(
        {"tensor_model_parallel_size": torch.distributed.get_world_size()},
        kv_channels=inputs[0].size(-1),
        attention_dropout=0.5,
        sequence_parallel=sequence_parallel,
    )
    outputs = [attention(*inputs, None) for _ in range(2)]
    attention.eval()
    return *outputs, attention(*inputs, None), torch.rand(4)


def in_sequence(parts: list[Tensor]) -> Tensor:
    """[s / CP, ...] of each context-parallel rank, two chunks of the sequence each -> [s, ...]."""
    chunks = {}
    for rank, part in enumerate(parts):
        chunks[rank], chunks[2 * len(parts) - 1 - rank] = part.chunk(2)
    return torch.cat([chunks[number] for number in range(len(chunks))])
