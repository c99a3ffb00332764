"""What gates share: which experts have the largest values, and what scores and weights these get."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.group_scores import group_score_topk
from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.gates.gate import Choice

_TINY = 1e-20
"""Added to sums of sigmoids, which may all be 0."""


def largest(moe: MoE, values: Tensor) -> Tensor:
    """[t, k] the experts of the largest values [t, e], the largest first; where experts lie in groups, of the
    best groups only.

    A group's value is the sum of some of its largest (see `group_score_topk`).
    """
    k, groups, chosen = moe.moe_router_topk, moe.moe_router_num_groups, moe.moe_router_group_topk
    if groups is not None and chosen is not None:
        grouped = values.unflatten(1, (groups, -1))
        summed = group_score_topk(moe)
        assert summed is not None
        best = grouped.topk(summed, dim=-1).values.sum(-1).topk(chosen, dim=-1).indices
        outside = torch.ones(len(values), groups, dtype=torch.bool, device=values.device)
        outside = outside.scatter(1, best, False)
        values = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
    return values.topk(k, dim=-1).indices


def weighed(moe: MoE, logits: Tensor, experts: Tensor, chosen: Tensor | None = None) -> Choice:
    """The choice of these experts, its scores and weights as the score function says.

    `softmax`: weights are the softmax over the k chosen logits (Mixtral), or with pre-softmax that over all e
    (Switch Transformer, DeepSeek-V2). `sigmoid`: sigmoids of the logits, with moe_router_norm_topk over their
    sum where k > 1 (DeepSeek-V3).

    Args:
        logits: [t, e].
        experts: [t, k].
        chosen: [t, k], see `Choice`; the others get no weight.
    """
    if moe.moe_router_score_function == "sigmoid":
        affinities = logits.sigmoid()
        scores = affinities / (affinities.sum(-1, keepdim=True) + _TINY)
        weights = affinities.gather(1, experts)
        weights = weights if chosen is None else weights * chosen
        if experts.size(1) > 1 and moe.moe_router_norm_topk:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    elif moe.moe_router_pre_softmax:
        scores = logits.softmax(-1)
        weights = scores.gather(1, experts)
        weights = weights if chosen is None else weights * chosen
    else:
        scores = logits.softmax(-1)
        of_chosen = logits.gather(1, experts)
        weights = (of_chosen if chosen is None else of_chosen.masked_fill(~chosen, -torch.inf)).softmax(-1)
    return Choice(experts, weights, scores, chosen)
