"""An all-to-all of rows that runs while something else is computed, forward and backward.

`start` launches it, `Pending.wait` hands over what came. Both are nodes of autograd, which goes through them
in reverse order: the gradient's way back is launched where the rows were waited for, and waited for where
they were launched. So whatever is computed between the two in the forward pass hides the exchange, and its
backward pass hides that of the gradient. No schedule of its own is needed for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.model.moe.dispatch.transfer import Transfer, TransferTimes
from megatron_moe.model.moe.groups import size


def start(
    rows: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: Any,
    times: TransferTimes | None = None,
) -> Pending:
    """Send each rank of a group its rows. All ranks call this, and `wait`, in the same order.

    Args:
        rows: [n, ..], those for rank 0 first; of any type.
        send_counts: how many rows each rank gets, adding up to n. May hold zeros.
        receive_counts: how many rows each rank sends here.
        group: the process group; None stands for this rank alone.
        times: where it is measured how long it takes, both ways.
    """
    if size(group) == 1:
        return Pending(rows, None)
    flight = _Flight(group, send_counts, receive_counts, times or TransferTimes())
    return Pending(_Start.apply(rows, flight), flight)


def exchange(
    rows: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: Any,
    times: TransferTimes | None = None,
) -> Tensor:
    """As `start`, and waits at once."""
    return start(rows, send_counts, receive_counts, group, times).wait()


class Pending:
    """Rows on their way.

    Args:
        rows: those that were there already; with a flight, the thread that ties its two ends together in
            autograd's graph: no rows, whose gradient of no rows has the right shape both ways.
        flight: what brings them.
    """

    def __init__(self, rows: Tensor, flight: _Flight | None) -> None:
        self._rows, self._flight = rows, flight

    def wait(self) -> Tensor:
        """[sum of receive_counts, ..], those of rank 0 first. To be called once."""
        return self._rows if self._flight is None else _Wait.apply(self._rows, self._flight)


@dataclass
class _Flight:
    """What the two nodes share: where rows go, and the transfer under way, in one direction or the other."""

    group: Any
    send_counts: list[int]
    receive_counts: list[int]
    times: TransferTimes
    transfer: tuple[Transfer, Tensor, Tensor] | None = None

    def launch(self, rows: Tensor, send: list[int], receive: list[int]) -> None:
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        transfer = self.times.launch(
            lambda: dist.all_to_all_single(received, rows, receive, send, group=self.group, async_op=True),
            rows.device,
        )
        # What is being sent must outlive the transfer.
        self.transfer = transfer, rows, received

    def land(self) -> Tensor:
        assert self.transfer is not None
        (transfer, _, received), self.transfer = self.transfer, None
        transfer.wait()
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.launch(rows, flight.send_counts, flight.receive_counts)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, thread: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.launch(grads[0], flight.receive_counts, flight.send_counts)
        return grads[0].new_empty(0), None
