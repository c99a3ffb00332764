"""What all routers of all ranks did in one step, summed so that it does not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.model.moe.layer_sums import COLUMNS, layer_sums
from megatron_moe.model.moe.statistics import NUMBERS

if TYPE_CHECKING:
    from megatron_moe.model.moe.router import Router


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


def all_layers(experiment: Experiment) -> int:
    """Transformer layers that may hold a router: those of the model, and behind them one in each
    multi-token-prediction layer."""
    return experiment.model.num_layers + experiment.model.mtp_num_layers


def local_sums(experiment: Experiment, chunks: list[torch.nn.Module], device: torch.device) -> LocalSums:
    """This rank's share of the sums. Collective over the ranks that share a microbatch (TP x CP)."""
    from megatron.core import parallel_state

    moe, layers = experiment.moe, all_layers(experiment)
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
        total[numbers] = layer_sums(rows, moe)
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
