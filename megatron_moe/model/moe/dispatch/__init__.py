"""How tokens travel to their experts: all dispatchers, by `moe.moe_token_dispatcher_type`."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.dispatch import exchange, two_level
from megatron_moe.model.moe.dispatch.allgather import AllGather
from megatron_moe.model.moe.dispatch.alltoall import AllToAll
from megatron_moe.model.moe.dispatch.deduplicated import Deduplicated
from megatron_moe.model.moe.dispatch.dispatcher import Dispatcher, Start
from megatron_moe.model.moe.dispatch.hot_experts import HotExperts
from megatron_moe.model.moe.dispatch.local import Local
from megatron_moe.model.moe.dispatch.replicated import Replicated
from megatron_moe.model.moe.dispatch.transfer import TransferTimes
from megatron_moe.model.moe.groups import MoEGroups, size
from megatron_moe.plan.journeys import Ranks, taken


def dispatcher(
    moe: MoE, groups: MoEGroups, hidden_size: int, dtype: torch.dtype, times: TransferTimes | None = None
) -> Dispatcher:
    """The dispatcher that the settings name, for a rank of these groups.

    Args:
        hidden_size, dtype: of the tokens, by which `auto` counts bytes.
        times: where it is measured how long tokens travel.
    """
    if size(groups.expert_ranks) == 1:
        return Local(moe.num_moe_experts)
    if groups.replicated_tokens and _within(groups.expert_ranks, groups.tensor):
        return Replicated(moe.num_moe_experts, groups)
    ranks = Ranks(size(groups.expert), size(groups.expert_tensor), moe.moe_ranks_per_node)
    name = taken(moe, hidden_size, dtype.itemsize, ranks)
    if name == "allgather":
        return AllGather(moe.num_moe_experts, groups, times)
    start = _start(moe, groups, times)
    if name == "deduplicated":
        return Deduplicated(moe.num_moe_experts, groups, start)
    assert name == "alltoall", name
    alltoall = AllToAll(moe.num_moe_experts, groups, start, moe.moe_overlap_degree)
    if moe.moe_shadowing is None:
        return alltoall
    return HotExperts(alltoall, moe.num_moe_experts, groups, moe.moe_shadowing, times)


def _start(moe: MoE, groups: MoEGroups, times: TransferTimes | None) -> Start:
    """What sends rows to the expert ranks."""
    if moe.moe_ranks_per_node is None:
        return partial(exchange.start, group=groups.expert_ranks, times=times)
    return partial(
        two_level.start, group=groups.expert_ranks, ranks_per_node=moe.moe_ranks_per_node, times=times
    )


def _within(inner: object, outer: object) -> bool:
    """Whether all ranks of a process group are in another one."""
    ranks = (set(dist.get_process_group_ranks(group)) for group in (inner, outer))  # type: ignore[arg-type]
    return next(ranks) <= next(ranks)
