"""Whole gradients of a step, as the optimizer is about to see them.

After a backward pass under the distributed optimizer a data-parallel rank holds the reduced gradients only of
its own shard of each bucket; the rest of its buffer is what it computed alone. Seen with megatron-core 0.16.1
and 0.19.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def watched(chunks: list[torch.nn.Module], look: Callable[[], None]) -> Iterator[None]:
    """While it lasts, `look` is called in every step between backward pass and update, on every rank.

    Then `main_grad` of each parameter is its whole gradient, reduced and not yet clipped.

    Args:
        chunks: wrapped model chunks of this rank.
    """
    from megatron.core.utils import get_model_config

    config = get_model_config(chunks[0])
    finalize = config.finalize_model_grads_func

    def finalize_and_look(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        _gather(chunks)
        look()

    config.finalize_model_grads_func = finalize_and_look
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _gather(chunks: list[torch.nn.Module]) -> None:
    """Fill each rank's gradient buffers with the shards of its data-parallel group. The optimizer reads only
    its own shard, so that nothing changes for it."""
    for chunk in chunks:
        for bucket_group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):  # type: ignore[misc]
            group = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                whole = bucket.grad_data
                mine = whole.chunk(group.size())[group.rank()].clone()
                dist.all_gather_single(whole, mine, group=group)
