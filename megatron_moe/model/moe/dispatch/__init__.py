"""How tokens travel to their experts: all dispatchers, by `moe.moe_token_dispatcher_type`."""

from __future__ import annotations

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.dispatch.dispatcher import Dispatcher
from megatron_moe.model.moe.dispatch.local import Local
from megatron_moe.model.moe.groups import MoEGroups, size


def dispatcher(moe: MoE, groups: MoEGroups) -> Dispatcher:
    """The dispatcher that the settings name, for a rank of these groups."""
    if size(groups.expert_ranks) == 1:
        return Local(moe.num_moe_experts)
    raise NotImplementedError
