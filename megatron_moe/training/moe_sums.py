"""What all routers of all ranks did in one step, summed so that it does not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema import Experiment, MoE
from megatron_moe.engine.checkpoint import unwrap

if TYPE_CHECKING:
    from megatron_moe.model.moe.router import Router

COLUMNS = ("microbatches", "assigned", "dropped", "would_drop", "aux_loss", "z_loss", "top1", "top2")


@dataclass(frozen=True)
class MoESums:
    """Sums over the global batch, one row a transformer layer; dense layers have zeros.

    Attributes:
        load: [layers, e] assignments an expert, before drops.
        columns: [layers, len(COLUMNS)]; the losses are sums over microbatches of the microbatch's value.
    """

    load: Tensor
    columns: Tensor

    def column(self, name: str) -> Tensor:
        """[layers] of one of `COLUMNS`."""
        return self.columns[:, COLUMNS.index(name)]


def local_sums(experiment: Experiment, chunks: list[torch.nn.Module], device: torch.device) -> Tensor:
    """[layers, e + len(COLUMNS)] float64: this rank's share of the sums; adding up all ranks' gives
    `MoESums`.

    Collective over the ranks that share a microbatch (TP x CP).
    """
    from megatron.core import parallel_state

    moe = experiment.moe
    assert moe is not None
    total = torch.zeros(
        experiment.model.num_layers, moe.num_moe_experts + len(COLUMNS), dtype=torch.float64, device=device
    )
    routers = [router for chunk in chunks for router in _routers(chunk)]
    if not routers:
        return total
    group = parallel_state.get_tensor_and_context_parallel_group()
    rows = torch.stack([router.statistics.take() for router in routers])  # [routers, microbatches, width]
    dist.all_reduce(rows, group=group)
    # Now each rank of the group has the whole microbatch; one of them speaks for it.
    if group.rank() == 0:
        total[[router.layer_number - 1 for router in routers]] = _layer_sums(rows, moe)
    return total


def split(total: Tensor, num_experts: int) -> MoESums:
    """The sums of all ranks, taken apart."""
    return MoESums(total[:, :num_experts], total[:, num_experts:])


def _routers(chunk: torch.nn.Module) -> list[Router]:
    from megatron_moe.model.moe.router import Router

    return [module for module in unwrap(chunk).modules() if isinstance(module, Router)]


def _layer_sums(rows: Tensor, moe: MoE) -> Tensor:
    """[layers, e + len(COLUMNS)] from the rows [layers, m, width] of their microbatches (see
    `model.moe.statistics`)."""
    e, k = moe.num_moe_experts, moe.moe_router_topk
    routed, kept, probs, extra = rows.split([e, e, e, rows.size(-1) - 3 * e], dim=-1)
    z_squares, top1, top2, tokens = extra.unbind(-1)
    tokens_or_one = tokens.clamp(min=1.0)
    capacity = (tokens * k / e * moe.moe_would_drop_capacity_factor).ceil()
    # Switch Transformer, eq. 4, with f the fraction of assignments: e * sum_j f_j P_j.
    aux_loss = e * (routed * probs).sum(-1) / (k * tokens_or_one.square())
    of_microbatches = torch.stack(
        [
            torch.ones_like(tokens),
            routed.sum(-1),
            (routed - kept).sum(-1),
            (routed - capacity.unsqueeze(-1)).clamp(min=0).sum(-1),
            aux_loss,
            z_squares / tokens_or_one,
            top1,
            top2,
        ],
        dim=-1,
    )
    return torch.cat([routed, of_microbatches], dim=-1).sum(1)
