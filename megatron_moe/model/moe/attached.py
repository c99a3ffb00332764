"""A loss that rides on an activation: its gradient joins when that of the activation comes by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attach(activation: Tensor, loss: Tensor) -> Tensor:
    """`activation`, which brings the gradient of `loss` with it.

    Under Megatron-Core's schedule the gradient has the scale of the language-model loss: over the number of
    microbatches, and what a loss scaler multiplies by. Elsewhere it is that of `loss` itself.
    """
    if loss.requires_grad:
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        scaler: Any = MoEAuxLossAutoScaler
        return scaler.apply(activation, loss)
    return activation


def set_scale(scale: float | Tensor) -> None:
    """The scale of all attached losses from now on; programs of one's own that scale their loss call it."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.as_tensor(scale))
