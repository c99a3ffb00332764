"""Each token goes once to each rank that holds any of its experts, which sums what these make of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_moe.model.moe.dispatch import labels
from megatron_moe.model.moe.dispatch.dispatcher import Experts, Start
from megatron_moe.model.moe.dispatch.local import by_local_experts
from megatron_moe.model.moe.dispatch.seats import exchange_counts, experts_here, over_parts, routing_here
from megatron_moe.model.moe.groups import MoEGroups, size
from megatron_moe.model.moe.permutation import sort_by_expert, to_experts, to_tokens
from megatron_moe.model.moe.routing import Routing


class Deduplicated:
    """A `Dispatcher` whose traffic does not grow with k beyond the number of ranks.

    Args:
        num_experts: e.
        groups: `expert_ranks` has more than one rank.
        start: sends rows to the ranks of `expert_ranks`.
    """

    def __init__(self, num_experts: int, groups: MoEGroups, start: Start) -> None:
        self.here = experts_here(num_experts, groups)
        self.groups, self.start = groups, start

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        # Ranks take the place of experts here: tokens are sorted by rank, and come back from each.
        ranks, needed = self.ranks(routing)
        permutation = sort_by_expert(ranks, needed, size(self.groups.expert_ranks))
        send, receive = exchange_counts(permutation.counts, self.start)
        under_way = (
            self.start(to_experts(tokens, permutation), send, receive),
            self.start(to_experts(labels.write(routing), permutation), send, receive),
        )
        beside = None if meanwhile is None else meanwhile()
        received, read = under_way[0].wait(), labels.read(under_way[1].wait())
        outputs = by_local_experts(received, routing_here(read, self.here), experts, len(self.here))
        combined = to_tokens(self.start(outputs, receive, send).wait(), permutation)
        return combined if beside is None else combined + beside

    @torch.no_grad()
    def ranks(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Ranks [t, n] int64 that each token may go to, and [t, n] bool, whether it does.

        n: the number of expert ranks, or k times ETP where that is less.
        """
        num_ranks, parts = size(self.groups.expert), size(self.groups.expert_tensor)
        owners = routing.experts // len(self.here)
        kept = torch.ones_like(owners) if routing.kept is None else routing.kept.long()
        count = kept.new_zeros(len(kept), num_ranks).scatter_add_(1, owners, kept)
        width = min(kept.size(1), num_ranks)
        ranks = (count == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        needed = count.gather(1, ranks) > 0
        return over_parts(ranks, parts), needed.repeat_interleave(parts, dim=1)
