"""All experts are on this rank: nothing travels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_moe.model.moe.dispatch.dispatcher import Experts, SortingExperts
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
        combined = by_local_experts(tokens, routing, experts, self.num_experts)
        return combined if meanwhile is None else combined + meanwhile()


def by_local_experts(tokens: Tensor, routing: Routing, experts: Experts, num_experts: int) -> Tensor:
    """[t, h]: the sum of what the experts of this rank make of each token; zeros where none gets it.

    Args:
        tokens: [t, h].
        routing: of these tokens, experts counted from 0 on this rank.
        num_experts: of this rank.
    """
    permutation = sort_by_expert(routing.experts, routing.kept, num_experts)
    weights = routing.weights.reshape(-1).index_select(0, permutation.assignments)
    if isinstance(experts, SortingExperts):
        return experts.of_unsorted(tokens, permutation, weights)
    outputs, _ = experts(to_experts(tokens, permutation), permutation.counts, weights)
    return to_tokens(outputs, permutation)
