"""A loss that rides on an activation: its gradient joins when that of the activation comes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scale = Callable[[], float | Tensor]
"""Asked in the backward pass: what the gradients of attached losses are multiplied by, as that of the main
loss is."""


def unscaled() -> float:
    """For a program that does not scale its loss."""
    return 1.0


def megatron_scale() -> float | Tensor:
    """The scale that Megatron-Core's schedule sets for each microbatch: what a loss scaler multiplies by,
    over the number of microbatches."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    scale: Tensor | None = MoEAuxLossAutoScaler.main_loss_backward_scale
    return 1.0 if scale is None else scale


def attach(activation: Tensor, loss: Tensor, scale: Scale = unscaled) -> Tensor:
    """`activation`, whose backward pass adds the gradient of `scale` times `loss` []."""
    if not loss.requires_grad:
        return activation
    attached: Tensor = _Attached.apply(activation, loss, scale)
    return attached


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: Scale) -> Tensor:
        ctx.scale, ctx.dtype, ctx.device = scale, loss.dtype, loss.device
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = torch.as_tensor(ctx.scale(), dtype=ctx.dtype, device=ctx.device)
        return grads[0], scale.reshape(()), None
