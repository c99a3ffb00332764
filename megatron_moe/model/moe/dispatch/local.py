"""All experts are on this rank: nothing travels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_moe.model.moe.dispatch.dispatcher import Experts
from megatron_moe.model.moe.permutation import sort_by_expert, to_experts, to_tokens
from megatron_moe.model.moe.routing import Routing


class Local:
    """A `Dispatcher` for EP 1 and ETP 1.

    Args:
        num_experts: e.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        permutation = sort_by_expert(routing.experts, routing.kept, self.num_experts)
        weights = routing.weights.reshape(-1).index_select(0, permutation.assignments)
        outputs, _ = experts(to_experts(tokens, permutation), permutation.counts, weights)
        combined = to_tokens(outputs, permutation)
        return combined if meanwhile is None else combined + meanwhile()
