"""One pass of Megatron-Core's pipeline schedule, and one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[[Tensor], Any]]]
"""(microbatches, model chunk) -> (output, loss function); Megatron-Core's contract."""


@dataclass(frozen=True)
class Shapes:
    """What the pipeline sends: microbatches b of sequences s."""

    num_microbatches: int
    micro_batch_size: int
    seq_length: int


def prepare(config: Any, optimizer: Any) -> None:
    """Give the schedule its gradient hooks. `config` is the TransformerConfig that the model chunks hold."""
    from megatron.core.distributed import finalize_model_grads

    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss


def run(
    chunks: list[torch.nn.Module],
    batches: list[Iterator[Any]],
    forward_step: ForwardStep,
    shapes: Shapes,
    forward_only: bool = False,
) -> list[Any]:
    """Forward, and unless `forward_only` backward, over all microbatches of this replica.

    Args:
        batches: one iterator over the replica's microbatches for each chunk.

    Returns:
        What the loss function reported for each microbatch; empty except on the last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=shapes.num_microbatches,
        seq_length=shapes.seq_length,
        micro_batch_size=shapes.micro_batch_size,
        forward_only=forward_only,
    )
    return reports


def zero_gradients(chunks: list[torch.nn.Module], optimizer: Any) -> None:
    """Empty the gradient buffers before a step."""
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()


def update(optimizer: Any) -> tuple[bool, float]:
    """Clip and step; (whether the weights were updated, global gradient norm before clipping)."""
    successful, norm, _ = optimizer.step()
    return bool(successful), float(norm)
