"""What a router decides for its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padded:
    """How many rows every expert computes, those that no token fills being zeros.

    What is kept does not depend on it: capacity is decided over a replica's microbatch, wherever its tokens
    and experts lie. An expert gets rows from each replica whose tokens reach its rank, so that it computes
    this many times the capacity. Rows are filled up where the experts compute; none of them travels.

    Attributes:
        rows: of each expert on each rank.
        at_least: an expert may get more, and then all of its rank compute as many as the fullest one: with 0
            just as many as that one has.
    """

    rows: int
    at_least: bool = False


@dataclass(frozen=True)
class Routing:
    """Where each token of this rank goes.

    Attributes:
        experts: [t, k] int64, different ones for each token.
        weights: [t, k] gate weights, differentiable; 0 where not kept.
        kept: [t, k] bool, false where an assignment was not made or was dropped; None: all are kept.
        capacity: how the rows of each expert are filled up with zeros; None: an expert computes what it gets.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor | None = None
    capacity: Padded | None = None

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


def expert_counts(experts: Tensor, which: Tensor | None, num_experts: int) -> Tensor:
    """[e] float64: how many of the assignments in `experts` [t, k] each expert has, of those where `which`
    [t, k] is true; None: all. Does not wait for the device, as `bincount` does."""
    flat = experts.reshape(-1)
    ones = torch.ones(1, dtype=torch.float64, device=flat.device).expand(len(flat))
    counts = torch.zeros(num_experts, dtype=torch.float64, device=flat.device)
    return counts.scatter_add_(0, flat, ones if which is None else which.reshape(-1).double())
