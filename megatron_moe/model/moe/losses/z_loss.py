"""The router z-loss of ST-MoE."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput


def z_loss(given: LossInput) -> Tensor:
    """mean(logsumexp(logits)^2) over the valid tokens (ST-MoE, eq. 5)."""
    squares = given.logits.logsumexp(dim=-1).square()
    return given.microbatch.total(given.microbatch.masked(squares).sum()) / given.microbatch.count
