"""Communication between replicas beside compute: reduced gradients, and weights gathered after an update.

Megatron-Core reduces a bucket of gradients as soon as the last microbatch's backward pass has filled it, and
gathers updated weights in hooks before the modules that need them, in evaluation too. Between an update and
the next forward pass a rank therefore holds new weights only in its own shard: whoever else reads weights
calls `complete_weights` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def connect(config: Any, chunks: list[torch.nn.Module]) -> None:
    """Give the schedule what it calls to start and to hold back communication, as Megatron-LM does.

    Args:
        config: the TransformerConfig that the model chunks hold.
        chunks: wrapped model chunks of this rank.
    """
    settings: Any = chunks[0].ddp_config
    if settings.overlap_grad_reduce:
        # Only the last microbatch's backward pass reduces.
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        # Stages start together, not each whenever it is ready, which would slow down the others' compute.
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    if settings.align_param_gather:
        config.param_sync_func = [_gather_of(chunk) for chunk in chunks]
    # All ranks start from whole weights; the first gather follows the first update.
    for group in _bucket_groups(chunks):
        group.param_gather_dispatched = True


def weights_updated(chunks: list[torch.nn.Module]) -> None:
    """Note after an update that a rank has only its own shard of the new weights."""
    for group in _bucket_groups(chunks):
        if group.ddp_config.overlap_param_gather:
            group.param_gather_dispatched = False


@torch.no_grad()
def complete_weights(chunks: list[torch.nn.Module]) -> None:
    """Wait until this rank holds all of the newest weights. A collective over the replicas.

    Does nothing where they are complete, and without `overlap_param_gather`.
    """
    for group in _bucket_groups(chunks):
        if not group.ddp_config.overlap_param_gather:
            continue
        if group.param_gather_handle is not None or not group.param_gather_dispatched:
            group.start_param_sync(force_sync=True)


def _gather_of(chunk: torch.nn.Module) -> Callable[..., None]:
    """Starts to gather what of a chunk's weights is not gathered yet."""

    def start(*parameters: Any) -> None:
        for group in _bucket_groups([chunk]):
            if not group.param_gather_dispatched:
                group.start_param_sync()

    return start


def _bucket_groups(chunks: list[torch.nn.Module]) -> Iterator[Any]:
    from megatron.core.distributed import DistributedDataParallel

    for chunk in chunks:
        # A chunk that is not wrapped for training has no buckets.
        if isinstance(chunk, DistributedDataParallel):
            yield from (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)


def _one_or_all(functions: list[Any]) -> Any:
    """Schedules without virtual stages expect a function, the interleaved one expects a list."""
    return functions[0] if len(functions) == 1 else functions
