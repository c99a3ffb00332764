"""Which rank holds which expert, and how many rows each rank is to expect of the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe.model.moe.dispatch.dispatcher import Start
from megatron_moe.model.moe.groups import MoEGroups, rank, size
from megatron_moe.model.moe.routing import Routing


def experts_here(num_experts: int, groups: MoEGroups) -> range:
    """The experts that this rank holds, or holds a part of."""
    count = num_experts // size(groups.expert)
    first = rank(groups.expert) * count
    return range(first, first + count)


def over_parts(expert_ranks: Tensor, parts: int) -> Tensor:
    """EP ranks [t, n] -> [t, n * parts], the ranks in the group of all expert ranks that hold the parts.

    Args:
        parts: ETP; the group counts ETP first.
    """
    if parts == 1:
        return expert_ranks
    places = torch.arange(parts, device=expert_ranks.device)
    return (expert_ranks.unsqueeze(-1) * parts + places).flatten(1)


def routing_here(routing: Routing, here: range) -> Routing:
    """Those assignments of a routing that go to the experts `here`, which are counted from 0."""
    experts = routing.experts - here.start
    kept = (experts >= 0) & (experts < len(here))
    if routing.kept is not None:
        kept &= routing.kept
    return replace(routing, experts=experts, kept=kept)


def exchange_counts(counts: Tensor, start: Start) -> tuple[list[int], list[int]]:
    """How many rows this rank sends to each expert rank, and how many it gets.

    Args:
        counts: [ranks] int64, those it sends.
    """
    one_each = [1] * len(counts)
    received = start(counts, one_each, one_each).wait()
    # One synchronisation with the host, not two.
    sent, expected = torch.stack([counts, received]).tolist()
    return sent, expected
