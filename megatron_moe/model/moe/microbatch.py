"""The microbatch that a router sees a part of: sums and order over the ranks that share it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.model.moe import marks as token_marks
from megatron_moe.model.moe.groups import MoEGroups, rank, size


class Microbatch:
    """This rank's t = s * b tokens of a microbatch, in the order [s, b].

    Args:
        length: s, places of the sequence on this rank.
        batch: b.
        groups: of the layer.
        marks: [s, b] of this rank's tokens or of all tokens of its tensor-parallel group (see `marks`).
            Either all ranks of a microbatch have them, or none.

    Attributes:
        valid: [t] bool, false for padding; None: every token counts.
        tokens: [t] numbers in the vocabulary, None where no marks hold them.
        positions: [t] places among all tokens of the run, None where no marks hold them.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        groups: MoEGroups,
        marks: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.length, self.batch, self.groups, self.device = length, batch, groups, device
        self.valid = self.tokens = self.positions = None
        if marks is None:
            return
        if marks.size(0) != length:
            marks = marks.chunk(size(groups.tensor), dim=0)[rank(groups.tensor)]
        marks = marks.reshape(-1)
        self.valid = ~token_marks.padding_of(marks)
        if marks.dtype != torch.bool:
            self.tokens, self.positions = token_marks.tokens_of(marks), token_marks.positions_of(marks)

    @property
    def sequences(self) -> Tensor:
        """[t] which of the b sequences each token belongs to."""
        return torch.arange(self.batch, device=self.device).repeat(self.length)

    @cached_property
    def places(self) -> Tensor:
        """[t] the place of each token in one process's order of the whole microbatch."""
        if size(self.groups.microbatch) == 1:
            return torch.arange(self.length * self.batch, device=self.device)
        return self.mine(torch.arange(len(self._order), device=self.device))

    @cached_property
    def count(self) -> Tensor:
        """[] float32: valid tokens of the whole microbatch, at least 1."""
        group = self.groups.microbatch
        if self.valid is None:
            whole = float(self.length * self.batch * size(group))
            return torch.full((), whole, device=self.device)
        return self.sum(self.valid.sum().float()).clamp(min=1.0)

    def masked(self, values: Tensor) -> Tensor:
        """[t, ..] with zeros for padding."""
        if self.valid is None:
            return values
        return values.masked_fill(~self.valid.view(-1, *[1] * (values.dim() - 1)), 0)

    def sum(self, values: Tensor) -> Tensor:
        """What this rank has, added up over the ranks of the microbatch. Passes no gradient."""
        values = values.detach()
        if size(self.groups.microbatch) == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.groups.microbatch)
        return values

    def total(self, values: Tensor) -> Tensor:
        """As `sum`, and a loss made of it has on each rank the whole value, and the gradient of this rank's
        part: the ranks' gradients add up to the whole one."""
        return values + (self.sum(values) - values.detach())

    def gather(self, rows: Tensor) -> Tensor:
        """[t, ..] of each rank -> [T, ..] of the whole microbatch, in one process's order of tokens."""
        group = self.groups.microbatch
        if size(group) == 1:
            return rows
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)[self._place]

    def mine(self, rows: Tensor) -> Tensor:
        """[T, ..] in one process's order -> this rank's [t, ..]."""
        group = self.groups.microbatch
        if size(group) == 1:
            return rows
        count = self.length * self.batch
        return rows[self._order[rank(group) * count : (rank(group) + 1) * count]]

    @cached_property
    def _order(self) -> Tensor:
        """Row i of what the ranks hold one after the other is row order[i] of the microbatch."""
        groups: Any = self.groups
        tensor = 1 if groups.replicated_tokens else size(groups.tensor)
        assert self.device is not None
        return sequence_order(tensor, size(groups.context), self.length, self.batch, self.device)

    @cached_property
    def _place(self) -> Tensor:
        """Row i of the microbatch is row place[i] of what the ranks hold one after the other."""
        return self._order.argsort()


def sequence_order(
    tensor_size: int, context_size: int, length: int, batch: int, device: torch.device
) -> Tensor:
    """[TP * CP * s * b]: where in one process's order of tokens those stand that the ranks of a TP x CP group
    hold one after the other.

    The group's ranks count TP first. Each CP rank holds chunks r and 2 CP - 1 - r of the sequence
    (Megatron-Core's zig-zag split), and its TP ranks equal parts of these (sequence parallelism).

    Args:
        length: s, places of the sequence on one rank.
        batch: b.
    """
    local = torch.arange(tensor_size * length, device=device)
    positions = local
    if context_size > 1:
        chunk = tensor_size * length // 2
        ranks = torch.arange(context_size, device=device)[:, None]
        first, second = local[:chunk] + ranks * chunk, local[:chunk] + (2 * context_size - 1 - ranks) * chunk
        positions = torch.cat([first, second], dim=1).flatten()
    return (positions[:, None] * batch + torch.arange(batch, device=device)).flatten()
