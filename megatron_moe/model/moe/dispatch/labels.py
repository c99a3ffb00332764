"""What travels beside a token, so that its experts are known where it arrives."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.model.moe.routing import Routing


def write(routing: Routing) -> Tensor:
    """[t, 2 k]: each token's gate weights, then the numbers of its experts, -1 where it does not go.

    One tensor, so that one transfer takes both; numbers of experts are exact in any precision of a router.
    """
    experts = routing.experts
    if routing.kept is not None:
        experts = experts.masked_fill(~routing.kept, -1)
    return torch.cat([routing.weights, experts.to(routing.weights.dtype)], dim=1)


def read(labels: Tensor) -> Routing:
    """The routing of the tokens that these labels came with."""
    weights, experts = labels.chunk(2, dim=1)
    experts = experts.detach().long()
    return Routing(experts, weights, experts >= 0)
