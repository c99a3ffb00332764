"""The groups of experts that DeepSeek-V2's losses balance."""

from __future__ import annotations

from megatron_moe.config.schema.moe import MoE


def device_groups(moe: MoE) -> int:
    """D."""
    groups = moe.moe_num_device_groups or moe.moe_router_num_groups
    if groups is None:
        raise ValueError("device_aux_loss and communication_aux_loss need moe_num_device_groups")
    return groups
