"""The weights of one expert out of those of several, without a gradient of the size of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weight_row(weights: Tensor, expert: int) -> Tensor:
    """weights[expert], of [e, ..], in one row."""
    row: Tensor = _WeightRow.apply(weights, expert)
    return row


class _WeightRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, expert: int) -> Tensor:
        ctx.weights, ctx.expert = weights, expert
        return weights[expert].flatten()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        weights, expert = ctx.weights, ctx.expert
        main = getattr(weights, "main_grad", None)
        if main is None:
            whole = torch.zeros_like(weights)
            whole[expert] = grads[0].view_as(whole[expert])
            return whole, None
        # Into Megatron-Core's buffer: experts that add their products there by themselves keep it from
        # looking at what autograd has.
        main[expert] += grads[0].view_as(main[expert])
        return None, None
