"""Runs in rank processes for test_exchange.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.model.moe.dispatch.exchange import exchange, start

COUNTS = [[2, 0, 3], [0, 0, 0], [4, 1, 2]]
"""COUNTS[i][j]: rows that rank i sends to rank j."""


def _mine(width: tuple[int, ...]) -> tuple[Tensor, list[int], list[int]]:
    """Rows of this rank, all of them different, and its counts."""
    rank = dist.get_rank()
    send, receive = COUNTS[rank], [row[rank] for row in COUNTS]
    rows = torch.arange(sum(send) * max(1, len(width) and width[0]), dtype=torch.float32) + 1000 * rank
    return rows.view(sum(send), *width), send, receive


def there_and_back(width: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """What a rank sends, what it gets, and the gradient of what it sent where each row gets the weight of the
    rank that holds it."""
    rows, send, receive = _mine(width)
    rows = rows.to(dtype)
    if dtype.is_floating_point:
        rows.requires_grad_()
    received = exchange(rows, send, receive, dist.group.WORLD)
    if dtype.is_floating_point:
        (received * (dist.get_rank() + 1)).sum().backward()
    return {"sent": rows.detach(), "received": received.detach(), "grad": rows.grad}


def order_of_events() -> list[str]:
    """Two exchanges with a product behind each: what is launched, waited for and computed, in order."""
    events: list[str] = []

    class Compute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, name: str) -> Tensor:
            ctx.name = name
            events.append(f"compute {name}")
            return rows * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            events.append(f"compute {ctx.name} backward")
            return grads[0] * 2, None

    original, works = dist.all_to_all_single, []

    def launch(*arguments: Any, **options: Any) -> Any:
        work = original(*arguments, **options)
        number = len(works)
        works.append(work)
        events.append(f"launch {number}")
        return _Watched(work, lambda: events.append(f"wait {number}"))

    dist.all_to_all_single = launch
    try:
        rows, send, receive = _mine((4,))
        rows.requires_grad_()
        pending = [start(rows * factor, send, receive, dist.group.WORLD) for factor in (1, 2)]
        outputs = [Compute.apply(part.wait(), name) for part, name in zip(pending, "ab", strict=True)]
        events.append("backward")
        torch.cat(outputs).sum().backward()
    finally:
        dist.all_to_all_single = original
    return events


class _Watched:
    def __init__(self, work: Any, on_wait: Any) -> None:
        self.work, self.on_wait = work, on_wait

    def wait(self) -> None:
        self.on_wait()
        self.work.wait()
