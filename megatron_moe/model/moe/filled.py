"""Experts that compute the same number of rows each, whatever comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_moe.model.moe.routing import Padded


def filled(experts: Any, capacity: Padded | None) -> Any:
    """Experts as a dispatcher calls them, with the rows of each filled up by zeros; None: as they are."""
    return experts if capacity is None else Filled(experts, capacity)


class Filled:
    """The rows that are filled in have gate weight 0, and what comes of them is thrown away: neither outputs
    nor gradients change.

    Args:
        experts: see `dispatch.dispatcher`.
        capacity: how many rows.
    """

    def __init__(self, experts: Any, capacity: Padded) -> None:
        self.experts, self.capacity = experts, capacity

    def __call__(self, tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        rows = self.capacity.rows
        if self.capacity.at_least:
            rows = max(rows, int(counts.max()))
        places = _places(counts.to(tokens.device), rows, len(tokens))
        whole = tokens.new_zeros(len(counts) * rows, tokens.size(1)).index_copy(0, places, tokens)
        whole_weights = weights.new_zeros(len(whole)).index_copy(0, places, weights)
        outputs, _ = self.experts(whole, torch.full_like(counts, rows), whole_weights)
        return outputs.index_select(0, places), None

    def split(self, sizes: Sequence[int]) -> list[Filled]:
        """The experts in parts, of so many each."""
        return [Filled(part, self.capacity) for part in self.experts.split(sizes)]


def _places(counts: Tensor, rows: int, number: int) -> Tensor:
    """[number] where each row, sorted by expert, stands when every expert has `rows` of them."""
    numbers = torch.arange(len(counts), device=counts.device)
    expert = torch.repeat_interleave(numbers, counts, output_size=number)
    starts = counts.cumsum(0) - counts
    return torch.arange(number, device=counts.device) + (numbers * rows - starts)[expert]
