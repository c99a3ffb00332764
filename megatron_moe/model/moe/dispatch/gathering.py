"""Collectives of equal parts that run while something else is computed, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.dispatch.flight import Flight, arrive, depart
from megatron_moe.model.moe.dispatch.transfer import TransferTimes
from megatron_moe.model.moe.groups import size


class Gathering:
    """Rows of all ranks on their way; the gradient's way back is a reduce-scatter.

    Args:
        rows: [t, ..], on every rank equally many.
        group: the process group.
        times: where it is measured how long it takes, both ways.
    """

    def __init__(self, rows: Tensor, group: Any, times: TransferTimes) -> None:
        self._flight = _Flight(group, times)
        self._thread = depart(rows, self._flight)

    def wait(self) -> Tensor:
        """[ranks * t, ..], those of rank 0 first. To be called once."""
        return arrive(self._thread, self._flight)


def check_equal(count: int, group: Any) -> None:
    """Raise InputError unless all ranks have as many rows: the backend would end the process."""
    counts = torch.empty(size(group), dtype=torch.int64)
    dist.all_gather_single(counts, torch.tensor([count]), group=group)
    if (counts != count).any():
        raise InputError(
            "the dispatcher allgather needs equally many tokens on all ranks, and they have "
            f"{counts.tolist()}; use alltoall or deduplicated (moe_token_dispatcher_type), which take any"
        )


def scatter_sum(rows: Tensor, group: Any, times: TransferTimes) -> Tensor:
    """[ranks * t, ..] -> [t, ..]: what all ranks have for this one, added up."""
    result: Tensor = _ScatterSum.apply(rows, _Flight(group, times))
    return result


def all_sum(rows: Tensor, group: Any) -> Tensor:
    """Rows added up over ranks that go on with the same sum: each takes the gradient as its own."""
    result: Tensor = _AllSum.apply(rows, group)
    return result


def all_have(rows: Tensor, group: Any) -> Tensor:
    """Rows that all ranks have, and of which each computes a part: their gradients are added up."""
    result: Tensor = _AllHave.apply(rows, group)
    return result


class _Flight(Flight):
    def leave(self, rows: Tensor) -> None:
        rows = rows.contiguous()
        gathered = rows.new_empty(size(self.group) * len(rows), *rows.shape[1:])
        self.launch(
            lambda: dist.all_gather_single(gathered, rows, group=self.group, async_op=True), rows, gathered
        )

    def turn_back(self, gradient: Tensor) -> None:
        rows = gradient.contiguous()
        mine = rows.new_empty(len(rows) // size(self.group), *rows.shape[1:])
        self.launch(
            lambda: dist.reduce_scatter_single(mine, rows, group=self.group, async_op=True), rows, mine
        )


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.turn_back(rows)
        return flight.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.leave(grads[0])
        return ctx.flight.land(), None


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        rows = rows.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(rows, group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _AllHave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
