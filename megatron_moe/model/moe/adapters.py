"""Low-rank adapters of routed experts: an A and a B for each matrix of each expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.model.moe.grouped_linear import grouped_linear
from megatron_moe.model.moe.groups import rank, size

Build = Callable[[tuple[int, ...], int], torch.nn.Parameter]
"""(shape, the dimension that is cut over the expert-tensor-parallel ranks) -> an uninitialised weight."""


class ExpertAdapter(torch.nn.Module):
    """What is added to one linear map of each expert: a scale times B_e A_e x (Hu et al. 2021).

    Of the map's own two sides the one that ETP cuts is cut here, too. The other one's matrix every
    expert-tensor-parallel rank needs whole, and has a gradient of its own for: it is kept in equal parts
    instead, along h, and put together for each forward pass, so that gradients are summed on their way back.

    Args:
        outputs, inputs: of the map on this rank.
        cuts_outputs: the map is cut along what goes out (fc1), else along what comes in (fc2).

    Parameters:
        lora_a: [e, rank, inputs], lora_b: [e, outputs, rank]; the one along h only a part of it.
    """

    def __init__(
        self,
        build: Build,
        experts: int,
        outputs: int,
        inputs: int,
        rank: int,
        cuts_outputs: bool,
        group: Any,
    ) -> None:
        super().__init__()
        self.cuts_outputs, self.group = cuts_outputs, group
        parts = size(group)
        if cuts_outputs:
            inputs //= parts
        else:
            outputs //= parts
        self.lora_a = build((experts, rank, inputs), 2)
        self.lora_b = build((experts, outputs, rank), 1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B as `adapted` takes them. Through the call of a module: its hooks wait for weights that are
        being gathered. Collective over the expert-tensor-parallel ranks."""
        if self.cuts_outputs:
            return _gathered(self.lora_a, 2, self.group), self.lora_b
        return self.lora_a, _gathered(self.lora_b, 1, self.group)


def adapted(
    output: Tensor, tokens: Tensor, a: Tensor, b: Tensor, scale: float, tokens_per_expert: Tensor
) -> Tensor:
    """output [t, out] + scale * B A tokens, for tokens [t, in] sorted by expert; a [e, rank, in], b [e, out,
    rank]."""
    narrow = grouped_linear(tokens, a, tokens_per_expert)
    return output + scale * grouped_linear(narrow, b, tokens_per_expert)


def _gathered(part: Tensor, dim: int, group: Any) -> Tensor:
    """The parts of all ranks of a group, one behind the other."""
    if size(group) == 1:
        return part
    whole: Tensor = _Gathered.apply(part, dim, group)
    return whole


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: Any) -> Tensor:
        ctx.dim, ctx.group = dim, group
        parts = [torch.empty_like(part) for _ in range(size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        whole = grads[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return whole.chunk(size(ctx.group), dim=ctx.dim)[rank(ctx.group)].contiguous(), None, None
