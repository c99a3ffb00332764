"""An all-to-all of rows that runs while something else is computed, forward and backward.

`start` launches it, `Pending.wait` hands over what came; see `flight`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_moe.model.moe.dispatch.flight import Flight, arrive, depart
from megatron_moe.model.moe.dispatch.transfer import TransferTimes
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
    return Pending(depart(rows, flight), flight)


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
        rows: those that were there already; with a flight, its thread.
        flight: what brings them.
    """

    def __init__(self, rows: Tensor, flight: _Flight | None) -> None:
        self._rows, self._flight = rows, flight

    def wait(self) -> Tensor:
        """[sum of receive_counts, ..], those of rank 0 first. To be called once."""
        return self._rows if self._flight is None else arrive(self._rows, self._flight)


class _Flight(Flight):
    def __init__(
        self, group: Any, send_counts: list[int], receive_counts: list[int], times: TransferTimes
    ) -> None:
        super().__init__(group, times)
        self.send_counts, self.receive_counts = send_counts, receive_counts

    def leave(self, rows: Tensor) -> None:
        self._exchange(rows, self.send_counts, self.receive_counts)

    def turn_back(self, gradient: Tensor) -> None:
        self._exchange(gradient, self.receive_counts, self.send_counts)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> None:
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        self.launch(
            lambda: dist.all_to_all_single(received, rows, receive, send, group=self.group, async_op=True),
            rows,
            received,
        )
