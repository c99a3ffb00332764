"""All tokens go to all ranks, and the sums of what their experts made of them come back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_moe.model.moe.dispatch import labels
from megatron_moe.model.moe.dispatch.dispatcher import Experts
from megatron_moe.model.moe.dispatch.gathering import Gathering, check_equal, scatter_sum
from megatron_moe.model.moe.dispatch.local import by_local_experts
from megatron_moe.model.moe.dispatch.seats import experts_here, routing_here
from megatron_moe.model.moe.dispatch.transfer import TransferTimes
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.routing import Routing


class AllGather:
    """A `Dispatcher` whose traffic does not depend on k, and that asks the host for nothing.

    Each rank of the group sends its tokens to all others, and computes what its experts, or its parts of
    them, get. All ranks must have equally many tokens; a host looks whether they have, a device, which
    would have to be waited for, does not.

    Args:
        num_experts: e.
        groups: `expert_ranks` has more than one rank.
        times: where it is measured how long tokens travel.
    """

    def __init__(self, num_experts: int, groups: MoEGroups, times: TransferTimes | None = None) -> None:
        self.here = experts_here(num_experts, groups)
        self.group, self.times = groups.expert_ranks, times or TransferTimes()

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        if not tokens.is_cuda:
            check_equal(len(tokens), self.group)
        under_way = (
            Gathering(tokens, self.group, self.times),
            Gathering(labels.write(routing), self.group, self.times),
        )
        beside = None if meanwhile is None else meanwhile()
        everything, read = under_way[0].wait(), labels.read(under_way[1].wait())
        outputs = by_local_experts(everything, routing_here(read, self.here), experts, len(self.here))
        combined = scatter_sum(outputs, self.group, self.times)
        return combined if beside is None else combined + beside
