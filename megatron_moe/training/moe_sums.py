"""What all routers of all ranks did in one step, summed so that it does not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema import Experiment, MoE
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.model.moe.capacity import capacity
from megatron_moe.model.moe.statistics import NUMBERS

if TYPE_CHECKING:
    from megatron_moe.model.moe.router import Router

COLUMNS = (
    "microbatches",
    "assigned",
    "dropped",
    "would_drop",
    "aux_loss",
    "z_loss",
    "entropy",
    "top1",
    "top2",
    "top3",
    "tokens",
    "not_finite",
)


@dataclass(frozen=True)
class MoESums:
    """Sums over the global batch, one row a transformer layer; dense layers have zeros.

    Attributes:
        load: [layers, e] assignments an expert, before drops.
        columns: [layers, len(COLUMNS)]; the losses are sums over microbatches of the microbatch's value,
            z_loss NaN for a gate without logits; not_finite is above 0 where a router got logits that are not
            finite.
    """

    load: Tensor
    columns: Tensor

    def column(self, name: str) -> Tensor:
        """[layers] of one of `COLUMNS`."""
        return self.columns[:, COLUMNS.index(name)]


@dataclass(frozen=True)
class LocalSums:
    """What one rank brings to `MoESums`.

    Attributes:
        total: [layers, e + len(COLUMNS)] float64; adding up all ranks' gives `MoESums`.
        not_finite: [layers] float64, above 0 where a router got logits from this rank's tokens that are not
            finite.
    """

    total: Tensor
    not_finite: Tensor


def local_sums(experiment: Experiment, chunks: list[torch.nn.Module], device: torch.device) -> LocalSums:
    """This rank's share of the sums. Collective over the ranks that share a microbatch (TP x CP)."""
    from megatron.core import parallel_state

    moe, layers = experiment.moe, experiment.model.num_layers
    assert moe is not None
    total = torch.zeros(layers, moe.num_moe_experts + len(COLUMNS), dtype=torch.float64, device=device)
    not_finite = torch.zeros(layers, dtype=torch.float64, device=device)
    routers = [router for chunk in chunks for router in routers_of(chunk)]
    if not routers:
        return LocalSums(total, not_finite)
    numbers = [router.layer_number - 1 for router in routers]
    rows = torch.stack([router.statistics.take() for router in routers])  # [routers, microbatches, width]
    not_finite[numbers] = rows[..., NUMBERS.index("not_finite") - len(NUMBERS)].sum(1)
    group = parallel_state.get_tensor_and_context_parallel_group()
    dist.all_reduce(rows, group=group)
    # Now each rank of the group has the whole microbatch; one of them speaks for it.
    if group.rank() == 0:
        total[numbers] = _layer_sums(rows, moe)
    return LocalSums(total, not_finite)


def local_drops(chunks: list[torch.nn.Module], device: torch.device) -> Tensor:
    """[2] assignments made and dropped in evaluation on this rank, over all its layers, since this was last
    asked."""
    drops = torch.zeros(2, dtype=torch.float64, device=device)
    for chunk in chunks:
        for router in routers_of(chunk):
            if (dropped := router.statistics.take_dropped()) is not None:
                drops += dropped
    return drops


def split(total: Tensor, num_experts: int) -> MoESums:
    """The sums of all ranks, taken apart."""
    return MoESums(total[:, :num_experts], total[:, num_experts:])


def routers_of(chunk: torch.nn.Module) -> list[Router]:
    """The routers of a model chunk."""
    from megatron_moe.model.moe.router import Router

    return [module for module in unwrap(chunk).modules() if isinstance(module, Router)]


def _layer_sums(rows: Tensor, moe: MoE) -> Tensor:
    """[layers, e + len(COLUMNS)] from the rows [layers, m, width] of their microbatches (see
    `model.moe.statistics`)."""
    e, k = moe.num_moe_experts, moe.moe_router_topk
    routed, kept, scores, numbers = rows.split([e, e, e, len(NUMBERS)], dim=-1)
    number = dict(zip(NUMBERS, numbers.unbind(-1), strict=True))
    tokens = number["tokens"]
    tokens_or_one = tokens.clamp(min=1.0)
    limit = torch.as_tensor(capacity(tokens, k, e, moe.moe_would_drop_capacity_factor))
    columns = {
        "microbatches": torch.ones_like(tokens),
        "assigned": routed.sum(-1),
        "dropped": (routed - kept).sum(-1),
        "would_drop": (routed - limit.unsqueeze(-1)).clamp(min=0).sum(-1),
        # Switch Transformer, eq. 4, with f the fraction of assignments: e * sum_j f_j P_j.
        "aux_loss": e * (routed * scores).sum(-1) / (k * tokens_or_one.square()),
        "z_loss": number["z_squares"] / tokens_or_one,
        **{name: number[name] for name in COLUMNS if name in number},
    }
    of_microbatches = torch.stack([columns[name] for name in COLUMNS], dim=-1)
    return torch.cat([routed, of_microbatches], dim=-1).sum(1)
