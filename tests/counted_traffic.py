"""Counts the bytes that a rank sends to others, by process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Traffic:
    """While it is entered, the collectives of torch.distributed are counted.

    What a ring or direct sends take: an all-gather sends a rank's part to all others, a reduce-scatter all
    parts but its own, an all-reduce both.

    Attributes:
        sent: bytes by the ranks of the group.
    """

    NAMES = (
        "all_to_all_single",
        "all_gather_single",
        "all_gather_into_tensor",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
        "all_reduce",
        "all_gather",
        "broadcast",
        "all_to_all",
        "reduce_scatter",
        "send",
        "isend",
    )

    def __init__(self) -> None:
        self.sent: Counter[tuple[int, ...]] = Counter()
        self._originals: dict[str, Any] = {}

    @property
    def total(self) -> int:
        """Bytes over all groups."""
        return sum(self.sent.values())

    def __enter__(self) -> Traffic:
        for name in self.NAMES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or dist.group.WORLD
            ranks = tuple(dist.get_process_group_ranks(group))
            self.sent[ranks] += getattr(self, f"_{name}")(ranks, *args, **kwargs)
            return self._originals[name](*args, **kwargs)

        return counting

    def _all_to_all_single(
        self,
        ranks: tuple[int, ...],
        output: Tensor,
        given: Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        **_: Any,
    ) -> int:
        own = ranks.index(dist.get_rank())
        kept = len(given) // len(ranks) if input_splits is None else input_splits[own]
        return (len(given) - kept) * _row(given)

    def _all_gather_single(self, ranks: tuple[int, ...], output: Tensor, given: Tensor, **_: Any) -> int:
        return (len(ranks) - 1) * _bytes(given)

    def _reduce_scatter_single(self, ranks: tuple[int, ...], output: Tensor, given: Tensor, **_: Any) -> int:
        return (len(ranks) - 1) * _bytes(output)

    _all_gather_into_tensor, _reduce_scatter_tensor = _all_gather_single, _reduce_scatter_single

    def _all_reduce(self, ranks: tuple[int, ...], given: Tensor, *_: Any, **__: Any) -> int:
        return 2 * (len(ranks) - 1) * _bytes(given) // len(ranks)

    def _all_gather(self, ranks: tuple[int, ...], outputs: list[Tensor], given: Tensor, **_: Any) -> int:
        return (len(ranks) - 1) * _bytes(given)

    def _unexpected(self, ranks: tuple[int, ...], *_: Any, **__: Any) -> int:
        raise AssertionError("no part of a dispatch")

    _broadcast = _all_to_all = _reduce_scatter = _send = _isend = _unexpected


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _row(tensor: Tensor) -> int:
    return _bytes(tensor) // len(tensor) if len(tensor) else 0
