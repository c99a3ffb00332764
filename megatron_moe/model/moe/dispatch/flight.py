"""A transfer that runs while something else is computed, in the forward pass and in the backward pass.

Two nodes of autograd's graph stand for it: one launches it and the other waits for it. In the backward pass
the second launches the transfer of the gradient, and the first waits for that. As autograd runs nodes in the
reverse order of their making, what was computed between the two hides both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moe.model.moe.dispatch.transfer import Transfer, TransferTimes


class Flight(ABC):
    """What the two nodes share: the transfer under way, in one direction or the other.

    Args:
        group: the process group.
        times: where it is measured how long it takes, both ways.
    """

    def __init__(self, group: Any, times: TransferTimes) -> None:
        self.group, self.times = group, times
        self._transfer: tuple[Transfer, Tensor, Tensor] | None = None

    @abstractmethod
    def leave(self, rows: Tensor) -> None:
        """Launch the way there."""

    @abstractmethod
    def turn_back(self, gradient: Tensor) -> None:
        """Launch the gradient's way."""

    def launch(self, collective: Callable[[], Any], sent: Tensor, received: Tensor) -> None:
        """Args:
        collective: launches it, and gives the work under way.
        sent: must outlive it.
        received: what `land` gives.
        """
        self._transfer = self.times.launch(collective, sent.device), sent, received

    def land(self) -> Tensor:
        """Wait for it."""
        assert self._transfer is not None
        (transfer, _, received), self._transfer = self._transfer, None
        transfer.wait()
        return received

    def gradient(self) -> Tensor | None:
        """Wait for the gradient of what left here."""
        return self.land()


def depart(rows: Tensor, flight: Flight) -> Tensor:
    """Launch it. Gives the thread that ties its two ends together in autograd's graph: no rows, whose
    gradient of no rows has the right shape both ways."""
    thread: Tensor = _Depart.apply(rows, flight)
    return thread


def arrive(thread: Tensor, flight: Flight) -> Tensor:
    """What `depart` sent on its way. To be called once."""
    rows: Tensor = _Arrive.apply(thread, flight)
    return rows


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.leave(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return ctx.flight.gradient(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, thread: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.turn_back(grads[0])
        return grads[0].new_empty(0), None
