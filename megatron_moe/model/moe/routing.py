"""What a router decides for its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Where each token of this rank goes.

    Attributes:
        experts: [t, k] int64, different ones for each token.
        weights: [t, k] gate weights, differentiable; 0 where not kept.
        kept: [t, k] bool, false where an assignment was not made or was dropped; None: all are kept.
        capacity: rows that every expert computes, the missing ones filled with zeros; None: as many as come.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor | None = None
    capacity: int | None = None

    def dense(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """Gate weights [t, e], 0 for the others, and the map [t, e] bool of Megatron-Core's dispatchers."""
        weights = self.weights.new_zeros(len(self.experts), num_experts).scatter(
            1, self.experts, self.weights
        )
        return weights, dense_map(self.experts, self.kept, num_experts)


def dense_map(experts: Tensor, which: Tensor | None, num_experts: int) -> Tensor:
    """[t, e] bool: the assignments in `experts` [t, k] where `which` [t, k] is true, None: all."""
    made: Tensor | bool = True if which is None else which
    empty = torch.zeros(len(experts), num_experts, dtype=torch.bool, device=experts.device)
    return empty.scatter(1, experts, made)
