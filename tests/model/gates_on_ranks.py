"""Run on a rank: Megatron-Core's own gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def topk(logits: Tensor, options: dict[str, Any], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Megatron-Core's gate weights and map [t, e], and the gradient of the weights times a ramp."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = logits.clone().requires_grad_()
    weights, _ = topk_routing_with_score_function(logits, expert_bias=bias, **options)
    (weights * torch.linspace(-1, 1, weights.numel()).view_as(weights)).sum().backward()
    assert logits.grad is not None
    return weights.detach(), logits.grad


def sinkhorn(logits: Tensor) -> Tensor:
    """[t, e] balanced."""
    from megatron.core.transformer.moe import moe_utils

    balanced: Tensor = moe_utils.sinkhorn(logits)
    return balanced
