"""All ranks have the same tokens: none travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from megatron_moe.model.moe.dispatch.dispatcher import Experts
from megatron_moe.model.moe.dispatch.gathering import all_have, all_sum
from megatron_moe.model.moe.dispatch.local import by_local_experts
from megatron_moe.model.moe.dispatch.seats import experts_here, routing_here
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.routing import Routing


class Replicated:
    """A `Dispatcher` for tensor parallelism without sequence parallelism, as in inference.

    Each rank computes what its own experts make of the tokens, and one all-reduce adds it up.

    Args:
        num_experts: e.
        groups: all ranks of `expert_ranks` have the same tokens.
    """

    def __init__(self, num_experts: int, groups: MoEGroups) -> None:
        self.here = experts_here(num_experts, groups)
        self.group = groups.expert_ranks

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        shared = replace(routing, weights=all_have(routing.weights, self.group))
        outputs = by_local_experts(
            all_have(tokens, self.group), routing_here(shared, self.here), experts, len(self.here)
        )
        combined = all_sum(outputs, self.group)
        return combined if meanwhile is None else combined + meanwhile()
