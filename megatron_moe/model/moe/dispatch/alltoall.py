"""A copy of each token travels to each of its experts, and what the expert made of it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.model.moe.dispatch import parts as partition
from megatron_moe.model.moe.dispatch.dispatcher import Experts, Pending, Start
from megatron_moe.model.moe.groups import MoEGroups, size
from megatron_moe.model.moe.permutation import sort_by_expert, to_experts, to_tokens
from megatron_moe.model.moe.routing import Routing


class AllToAll:
    """A `Dispatcher` for EP x ETP ranks.

    Where an expert is spread over ETP ranks, a token's copy goes straight to each of them, and their partial
    results are added up where it came from. This moves as many bytes as gathering over ETP behind an
    all-to-all over EP, in one step.

    An expert sees its rows in the order (source rank, token).

    Args:
        num_experts: e.
        groups: `expert_ranks` has more than one rank.
        start: sends rows to the ranks of `expert_ranks`.
        degree: parts that travel one behind the other: all are sent at once, and while one is computed those
            behind it arrive, and those before it are on their way back. So it is in the backward pass too, in
            reverse.
    """

    def __init__(self, num_experts: int, groups: MoEGroups, start: Start, degree: int = 1) -> None:
        self.start, self.ranks = start, size(groups.expert_ranks)
        self.tensor_ranks = size(groups.expert_tensor)
        self.local_experts = num_experts // size(groups.expert)
        self.parts = partition.split(self.local_experts, degree)

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        routing = self._over_parts(routing)
        permutation = sort_by_expert(routing.experts, routing.kept, self.ranks * self.local_experts)
        counts = permutation.counts.view(self.ranks, self.local_experts)
        theirs = self.start(counts, [1] * self.ranks, [1] * self.ranks)
        permutation = partition.by_parts(permutation, routing.experts, self.parts)
        rows = to_experts(tokens, permutation)
        weights = routing.weights.reshape(-1).index_select(0, permutation.assignments)
        # The only time that the host waits for its device.
        both = torch.stack([counts, theirs.wait()]).cpu()
        journeys = [_Journey(part.of(both), self.start) for part in self.parts]
        lengths = [journey.length for journey in journeys]
        for journey, *its in zip(journeys, rows.split(lengths), weights.split(lengths), strict=True):
            journey.leave(*its)
        beside = None if meanwhile is None else meanwhile()
        for journey, these in zip(journeys, partition.experts_of(self.parts, experts), strict=True):
            journey.visit(these)
        returned = [journey.come_home() for journey in journeys]
        combined = to_tokens(torch.cat(returned) if returned[1:] else returned[0], permutation)
        return combined if beside is None else combined + beside

    def _over_parts(self, routing: Routing) -> Routing:
        """The routing [t, k * ETP] to experts counted over all ranks that hold one, or a part of one."""
        copies = self.tensor_ranks
        if copies == 1:
            return routing
        owner, local = routing.experts // self.local_experts, routing.experts % self.local_experts
        ranks = owner.unsqueeze(-1) * copies + torch.arange(copies, device=owner.device)
        return replace(
            routing,
            experts=(ranks * self.local_experts + local.unsqueeze(-1)).flatten(1),
            weights=routing.weights.repeat_interleave(copies, dim=1),
            kept=None if routing.kept is None else routing.kept.repeat_interleave(copies, dim=1),
        )


class _Journey:
    """One part's way to its experts and back.

    Args:
        counts: [2, ranks, experts of the part] rows that this rank sends to each rank's experts, and rows
            that each rank sends to the experts here.
    """

    def __init__(self, counts: Tensor, start: Start) -> None:
        self.start, self.arriving = start, counts[1]
        self.sent, self.received = counts.sum(-1).tolist()
        self.length = sum(self.sent)
        self.under_way: tuple[Pending, ...] = ()

    def leave(self, rows: Tensor, weights: Tensor) -> None:
        self.under_way = tuple(self.start(x, self.sent, self.received) for x in (rows, weights))

    def visit(self, experts: Experts) -> None:
        """Wait for the rows, compute them and send them back."""
        ranks, count = self.arriving.shape
        sizes = self.arriving.flatten().tolist()
        rows, weights = (turned(x.wait(), sizes, ranks, count) for x in self.under_way)
        computed, _ = experts(rows, self.arriving.sum(0), weights)
        computed = turned(computed, self.arriving.t().flatten().tolist(), count, ranks)
        self.under_way = (self.start(computed, self.received, self.sent),)

    def come_home(self) -> Tensor:
        (rows,) = self.under_way
        return rows.wait()


def turned(rows: Tensor, sizes: list[int], lines: int, columns: int) -> Tensor:
    """Rows in chunks [lines][columns] of `sizes` -> the same chunks as [columns][lines]."""
    if lines == 1 or columns == 1:
        return rows
    result: Tensor = _Turned.apply(rows, sizes, lines, columns)
    return result


class _Turned(torch.autograd.Function):
    """One copy each way, where autograd's own way would make two of a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], lines: int, columns: int) -> Tensor:
        ctx.turned_sizes = [
            sizes[line * columns + column] for column in range(columns) for line in range(lines)
        ]
        ctx.shape = columns, lines
        return _turned(rows, sizes, lines, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _turned(grads[0], ctx.turned_sizes, *ctx.shape), None, None, None


def _turned(rows: Tensor, sizes: list[int], lines: int, columns: int) -> Tensor:
    chunks = rows.split(sizes)
    return torch.cat([chunks[line * columns + column] for column in range(columns) for line in range(lines)])
