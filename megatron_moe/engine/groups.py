"""Process groups: torch.distributed and Megatron-Core's parallel state, made from a `Layout`."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_moe.engine.device import Device
from megatron_moe.plan.layout import Layout

_SEED_STRIDE = 1_000_003
"""Wider than what Megatron-Core adds to a seed for its tensor-parallel and expert ranks."""


def initialize_process_group(device: Device, timeout_s: int) -> None:
    """Join the ranks named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Does nothing if already
    joined."""
    if dist.is_initialized():
        return
    dist.init_process_group(
        backend=device.backend,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
        device_id=None if device.is_host else device.torch_device,
    )


def initialize_model_parallel(
    layout: Layout, seed: int, timeout_s: int, embedding_copy: int | None = None
) -> None:
    """Build Megatron-Core's groups for `layout` and seed this rank's random states.

    The tensor-parallel ranks of a replica share the default state and have one each in Megatron-Core's
    tracker; replicas, context-parallel ranks and pipeline ranks have states of their own, so that no two drop
    alike. Only dropout and other noise depend on them: weights are drawn by name (`model.initialization`).

    The process group must exist and have `layout.world_size` ranks.

    Args:
        embedding_copy: pipeline rank that shares the embedding with the first. Default: the last, where one
            does.
    """
    from megatron.core import parallel_state, tensor_parallel

    assert dist.get_world_size() == layout.world_size
    virtual = layout.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_s / 60,  # an int by its type, but only ever given to timedelta
        create_gloo_process_groups=gloo_beside_nccl(),
        get_embedding_ranks=None
        if embedding_copy is None
        else lambda ranks: [ranks[0], ranks[embedding_copy]],
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    own_seed = seed + _SEED_STRIDE * (parallel_state.get_pipeline_model_parallel_rank() * replicas + replica)
    torch.manual_seed(own_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(own_seed)


def gloo_beside_nccl() -> bool:
    """Whether data-parallel groups have a second group over gloo, on which a save gathers the optimizer's
    state in host memory. Where gloo is the backend a second one would only cost threads."""
    return dist.get_backend() == "nccl"


def destroy() -> None:
    """Leave every group but the world's, so that another layout can be built in the same processes."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # Megatron-Core only forgets most of them, and each keeps threads and connections.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def shutdown() -> None:
    """Leave torch.distributed."""
    if dist.is_initialized():
        dist.destroy_process_group()
