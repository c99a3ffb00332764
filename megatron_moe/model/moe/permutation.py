"""Tokens sorted by expert, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """Assignments sorted by expert, those of one expert in the order of the tokens.

    Attributes:
        sources: [n] for each sorted row the token it is a copy of.
        assignments: [n] for each sorted row its place in the flattened [t, k].
        rows: [t, k] for each assignment its sorted row; n where it was not kept.
        counts: [e] rows an expert.
    """

    sources: Tensor
    assignments: Tensor
    rows: Tensor
    counts: Tensor


@torch.no_grad()
def sort_by_expert(experts: Tensor, kept: Tensor | None, num_experts: int) -> Permutation:
    """Args:
    experts: [t, k] int64, numbers from 0 to num_experts - 1.
    kept: [t, k] bool; None: all.
    """
    k = experts.size(1)
    flat = experts.reshape(-1)
    if kept is not None:
        flat = flat.masked_fill(~kept.reshape(-1), num_experts)
    # Few bits sort fast; and a GPU counts what is sorted without asking the host how long the result is.
    numbers, order = flat.to(torch.int16 if num_experts < 2**15 else torch.int64).sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=flat.device, dtype=numbers.dtype)
    counts = torch.searchsorted(numbers, bounds).diff()
    if kept is not None:
        order = order[: int(counts.sum())]
    rows = torch.full_like(flat, len(order))
    rows[order] = torch.arange(len(order), device=flat.device)
    return Permutation(order // k, order, rows.view_as(experts), counts)


def to_experts(tokens: Tensor, permutation: Permutation) -> Tensor:
    """[t, h] -> [n, h], a copy of each token for each of its experts."""
    return _ToExperts.apply(tokens, permutation)


def to_tokens(outputs: Tensor, permutation: Permutation) -> Tensor:
    """[n, h] -> [t, h], the sum of what each token's experts made of it."""
    return _ToTokens.apply(outputs, permutation)


class _ToExperts(torch.autograd.Function):
    """Each direction is the other's gradient; summed in the order of the choices, without atomics."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return tokens.index_select(0, permutation.sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_of_choices(grads[0], ctx.permutation.rows), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum_of_choices(outputs, permutation.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.permutation.sources), None


def _sum_of_choices(sorted_rows: Tensor, rows: Tensor) -> Tensor:
    """[n, h] and for each token its k rows [t, k], n where there is none -> [t, h]."""
    if len(sorted_rows) == rows.numel():
        if rows.size(1) == 1:
            return sorted_rows.index_select(0, rows.flatten())
        # One pass that sums in the order of the choices, in fp32 also where rows have fewer bits.
        return F.embedding_bag(rows, sorted_rows, mode="sum")
    there = rows < len(sorted_rows)
    numbers = there.sum(1)
    return F.embedding_bag(rows[there], sorted_rows, numbers.cumsum(0) - numbers, mode="sum")
