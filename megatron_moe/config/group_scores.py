"""What a group of experts counts for in group-limited routing, where nobody says it."""

from __future__ import annotations

from megatron_moe.config.schema.moe import MoE


def group_score_topk(moe: MoE) -> int | None:
    """How many of a group's largest scores are added up: moe_router_group_score_topk, else one with a softmax
    (DeepSeek-V2), or as many as would come out of each chosen group (DeepSeek-V3). None without groups."""
    if moe.moe_router_group_score_topk is not None or moe.moe_router_group_topk is None:
        return moe.moe_router_group_score_topk
    if moe.moe_router_score_function == "softmax":
        return 1
    return max(1, moe.moe_router_topk // moe.moe_router_group_topk)
