"""DeepSeek-V2's loss that balances what is sent to the devices which hold the experts."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.device_groups import device_groups
from megatron_moe.model.moe.losses.loss import LossInput


def communication_aux_loss(given: LossInput) -> Tensor:
    """sum_i f''_i P''_i over the D groups of experts: f''_i = D / (M t) times the tokens that are sent to
    group i, P''_i the sum of its experts' mean scores (DeepSeek-V2, eqs. 29 to 31).

    M is the most groups that a token is sent to: moe_router_group_topk where these are the groups that
    routing is limited to, else what k allows. 1 at perfect balance where each token is sent to M groups."""
    moe, groups = given.moe, device_groups(given.moe)
    most = min(moe.moe_router_topk, groups)
    if moe.moe_router_group_topk is not None and moe.moe_router_num_groups == groups:
        most = moe.moe_router_group_topk
    sent = given.routed.view(len(given.logits), groups, -1).any(2).sum(0, dtype=given.choice.scores.dtype)
    fractions = given.microbatch.sum(sent) * groups / (most * given.microbatch.count)
    return (fractions * given.mean_scores.view(groups, -1).sum(1)).sum()
