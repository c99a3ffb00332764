"""FasterMoE's shadowing: experts with far more rows than others are copied to all ranks for one microbatch.

A row of such an expert is computed where it is, by the copy, while other rows travel; the copies' gradients
are added up on the rank that holds the expert. Whether that pays is said by a latency model, from the rows
that each rank has for each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema.moe import Shadowing
from megatron_moe.model.moe.dispatch.dispatcher import Dispatcher, Experts
from megatron_moe.model.moe.dispatch.flight import Flight, arrive, depart
from megatron_moe.model.moe.dispatch.local import by_local_experts
from megatron_moe.model.moe.dispatch.transfer import TransferTimes
from megatron_moe.model.moe.groups import MoEGroups, rank, size
from megatron_moe.model.moe.routing import Routing, expert_counts


@runtime_checkable
class CopyableExperts(Protocol):
    """Experts whose weights can be sent to other ranks."""

    def flat(self, expert: int) -> Tensor:
        """All weights of one of this rank's experts, in one row."""
        ...

    def of_flat(self, rows: Tensor) -> Experts:
        """The experts of such rows [n, numbers]."""
        ...


class HotExperts:
    """A `Dispatcher` that copies hot experts, and leaves the rest to another one.

    Args:
        others: for all tokens of experts that are not copied.
        num_experts: e.
        groups: `expert` has more than one rank, `expert_tensor` one.
        settings: rates of the latency model.
        times: where it is measured how long weights and gradients travel.
    """

    def __init__(
        self,
        others: Dispatcher,
        num_experts: int,
        groups: MoEGroups,
        settings: Shadowing,
        times: TransferTimes | None = None,
    ) -> None:
        self.others, self.group, self.settings = others, groups.expert, settings
        self.num_experts, self.times = num_experts, times or TransferTimes()
        self.local_experts = num_experts // size(groups.expert)
        self._copied = self._microbatches = 0

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        assert isinstance(experts, CopyableExperts)
        hot = self._hot(tokens, routing, experts)
        if torch.is_grad_enabled():
            self._copied, self._microbatches = self._copied + len(hot), self._microbatches + 1
        if not hot:
            return self.others(tokens, routing, experts, meanwhile)
        copies = [_Copy(experts, *divmod(expert, self.local_experts), self) for expert in hot]
        is_hot, number = self._numbered(routing, hot)
        here = replace(routing, experts=number, kept=is_hot)
        kept = ~is_hot if routing.kept is None else routing.kept & ~is_hot

        def beside() -> Tensor:
            of_copies = experts.of_flat(torch.stack([copy.wait() for copy in copies]))
            computed = by_local_experts(tokens, here, of_copies, len(hot))
            return computed if meanwhile is None else computed + meanwhile()

        return self.others(tokens, replace(routing, kept=kept), experts, beside)

    def take(self) -> tuple[int, int]:
        """Experts copied in microbatches with gradients, and the number of those; starts anew."""
        counts = self._copied, self._microbatches
        self._copied = self._microbatches = 0
        return counts

    @torch.no_grad()
    def _hot(self, tokens: Tensor, routing: Routing, experts: CopyableExperts) -> list[int]:
        """The experts to copy; the same ones on every rank."""
        mine = expert_counts(routing.experts, routing.kept, self.num_experts)
        rows = [torch.empty_like(mine) for _ in range(size(self.group))]
        dist.all_gather(rows, mine, group=self.group)
        numbers = experts.flat(0).numel()
        return worth_copying(
            torch.stack(rows).cpu(),
            row_bytes=tokens.size(1) * tokens.element_size(),
            row_flops=2 * numbers,
            expert_bytes=numbers * tokens.element_size(),
            settings=self.settings,
        )

    def _numbered(self, routing: Routing, hot: list[int]) -> tuple[Tensor, Tensor]:
        """[t, k] whether an assignment is to a copied expert, and the number of its copy."""
        table = torch.full((self.num_experts,), -1, device=routing.experts.device)
        table[torch.tensor(hot, device=table.device)] = torch.arange(len(hot), device=table.device)
        number = table[routing.experts]
        is_hot = number >= 0
        return (is_hot if routing.kept is None else is_hot & routing.kept), number.clamp(min=0)


def worth_copying(
    rows: Tensor, row_bytes: float, row_flops: float, expert_bytes: float, settings: Shadowing
) -> list[int]:
    """The experts that are to be copied, those with the most rows first; empty where it does not pay.

    A microbatch takes 3 times the products of the rank with the most rows (forward, and twice that backward),
    4 times the exchange of the rank that sends or gets the most rows (there and back, forward and backward),
    and 2 transfers of each copied expert (its weights, their gradients). This is FasterMoE's model.

    Args:
        rows: [ranks, e] that each rank has for each expert; rank r holds e / ranks of these, counted from
            r * e / ranks.
        row_flops: of an expert's products for one row, forward: 4 a H^2 for two matrices of H by a H.
    """
    ranks, num_experts = rows.shape
    owner = torch.arange(num_experts) // (num_experts // ranks)
    order = rows.sum(0).argsort(descending=True, stable=True)[: settings.maximum].tolist()
    times = []
    for count in range(len(order) + 1):
        far = rows.clone()
        far[:, order[:count]] = 0
        here = (rows - far).sum(1)
        between = torch.zeros(ranks, ranks, dtype=rows.dtype).index_add(1, owner, far)
        computed = between.sum(0) + here
        between.fill_diagonal_(0)
        moved = torch.maximum(between.sum(0), between.sum(1))
        times.append(
            3 * float(computed.max()) * row_flops / settings.flops_per_second
            + 4 * float(moved.max()) * row_bytes / settings.bytes_per_second
            + 2 * count * expert_bytes / settings.bytes_per_second
        )
    return order[: times.index(min(times))]


class _Copy:
    """The weights of one expert on their way to all ranks.

    Args:
        owner, expert: the rank that holds it, and its number there.
    """

    def __init__(self, experts: CopyableExperts, owner: int, expert: int, dispatcher: HotExperts) -> None:
        mine = owner == rank(dispatcher.group)
        row = experts.flat(expert if mine else 0)
        if not mine:
            # Not the weights, but on every rank something that has gradients where they have.
            row = row.detach().requires_grad_(row.requires_grad)
        self._flight = _Flight(dist.get_global_rank(dispatcher.group, owner), mine, dispatcher)
        self._thread = depart(row, self._flight)

    def wait(self) -> Tensor:
        """The weights. To be called once."""
        return arrive(self._thread, self._flight)


class _Flight(Flight):
    """Of weights from their owner, and of gradients to it."""

    def __init__(self, owner: int, mine: bool, dispatcher: HotExperts) -> None:
        super().__init__(dispatcher.group, dispatcher.times)
        self.owner, self.mine = owner, mine

    def leave(self, rows: Tensor) -> None:
        self._send(dist.broadcast, rows)

    def turn_back(self, gradient: Tensor) -> None:
        self._send(dist.reduce, gradient)

    def gradient(self) -> Tensor | None:
        row = self.land()
        return row if self.mine else None

    def _send(self, collective: Callable[..., Any], row: Tensor) -> None:
        row = row.clone(memory_format=torch.contiguous_format)
        self.launch(lambda: collective(row, self.owner, group=self.group, async_op=True), row, row)
