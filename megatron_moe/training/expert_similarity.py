"""How alike the experts of a layer are: what upcycled ones begin with in common, and lose as they specialise.

With u the weights of an expert as one vector of length 1, |u_1 + .. + u_e|^2 = e + 2 x the sum of the cosines
of all pairs. So the mean cosine follows from one sum over the experts, and no rank needs others' weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.engine.overlap import complete_weights
from megatron_moe.model.moe.experts import Experts
from megatron_moe.model.moe.groups import rank, size
from megatron_moe.model.moe.router import Router
from megatron_moe.training.moe_sums import all_layers

KEY = "moe/per_layer/expert_similarity"

_BLOCK = 1 << 24
"""Numbers of an expert that are summed at once, which bounds the memory."""


@torch.no_grad()
def expert_similarity(
    experiment: Experiment, chunks: list[torch.nn.Module], device: torch.device
) -> dict[str, list[float]]:
    """For each transformer layer the mean cosine between the weights (both matrices) of two of its experts,
    NaN where it is dense. Collective over all ranks."""
    complete_weights(chunks)
    found = torch.zeros(all_layers(experiment), 2, dtype=torch.float64, device=device)
    for number, experts in _layers(chunks):
        similarity = mean_cosine(experts)
        groups = experts.groups
        if rank(groups.expert_ranks) == 0 and rank(groups.expert_data) == 0:
            found[number] = torch.stack([similarity, torch.ones_like(similarity)])
    dist.all_reduce(found)
    return {KEY: [value if there else math.nan for value, there in found.tolist()]}


def mean_cosine(experts: Experts) -> Tensor:
    """[] float64, of the experts of all ranks, the same on each. Collective over the ranks that together hold
    each expert once."""
    groups = experts.groups
    weights = [weight.flatten(1) for weight in (experts.linear_fc1, experts.linear_fc2)]
    squares = torch.stack([_squares(weight) for weight in weights]).sum(0)
    _add_up(squares, groups.expert_tensor)
    factors = squares.rsqrt()
    total = squares.new_zeros(())
    for weight in weights:
        for block in weight.split(_BLOCK, dim=1):
            summed = factors.to(torch.float32) @ block.float()
            _add_up(summed, groups.expert)
            total += summed.double().square().sum()
    _add_up(total, groups.expert_tensor)
    count = experts.num_local_experts * size(groups.expert)
    return (total - count) / (count * (count - 1))


def _squares(weight: Tensor) -> Tensor:
    """[e, n] -> [e] float64."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()


def _add_up(values: Tensor, group: Any) -> None:
    """Over the ranks of a group, in place."""
    if size(group) > 1:
        dist.all_reduce(values, group=group)


def _layers(chunks: list[torch.nn.Module]) -> Iterator[tuple[int, Experts]]:
    """The routed experts of each MoE layer of this rank, with the layer's number from 0."""
    for chunk in chunks:
        for layer in unwrap(chunk).modules():
            router, experts = getattr(layer, "router", None), getattr(layer, "experts", None)
            if isinstance(router, Router) and isinstance(experts, Experts):
                yield router.layer_number - 1, experts
