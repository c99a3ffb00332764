"""Gating-logit normalization (Skywork-MoE)."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(logits: Tensor, factor: float, epsilon: float) -> Tensor:
    """factor * (z - mean(z)) / (std(z) + epsilon) over the experts of each token (Skywork-MoE, eq. 6), std
    unbiased, with its gradient.

    Equal logits stay equal; the gradient is that of a standard deviation of 0 which does not move.

    Args:
        logits: [t, e], e at least 2.
    """
    centered = logits - logits.mean(-1, keepdim=True)
    variance = centered.square().sum(-1, keepdim=True) / (logits.size(-1) - 1)
    # The square root of 0 has no gradient.
    spread = variance > 0
    std = torch.where(spread, variance, 1.0).sqrt() * spread
    return factor * centered / (std + epsilon)
