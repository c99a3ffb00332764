"""What the balancing losses of a step came to, and the coefficients with which they were taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment, MoE
from megatron_moe.model.moe.balancing import losses_of
from megatron_moe.training.moe_sums import all_layers, routers_of

Z_LOSS = "z_loss"


@dataclass(frozen=True)
class BalanceSums:
    """Of all MoE layers, one row a transformer layer; dense layers have zeros.

    Attributes:
        losses: [layers, losses] sums over the global batch's microbatches, without coefficient, in the order
            of `losses_of`.
        coefficients: [layers, losses + 1] with which they were taken, that of the z-loss last.
    """

    losses: Tensor
    coefficients: Tensor


def local_balance(experiment: Experiment, chunks: list[torch.nn.Module], device: torch.device) -> Tensor:
    """[layers, losses + losses + 1] float64: this rank's share of `BalanceSums`; adding up all ranks' gives
    it."""
    from megatron.core import parallel_state

    assert experiment.moe is not None
    names = list(losses_of(experiment.moe))
    total = torch.zeros(all_layers(experiment), 2 * len(names) + 1, dtype=torch.float64, device=device)
    # All ranks of a microbatch have its values, and all ranks of a stage the coefficients: one speaks.
    speaks = parallel_state.get_tensor_and_context_parallel_group().rank() == 0
    is_first_replica = parallel_state.get_data_parallel_rank() == 0
    for chunk in chunks:
        for router in routers_of(chunk):
            values, row = router.balancing.take_values(), total[router.layer_number - 1]
            if speaks:
                row[: len(names)] = values
            if speaks and is_first_replica:
                factors = (*router.balancing.coefficients.values(), router.balancing.z_coefficient)
                for place, factor in enumerate(factors, len(names)):
                    row[place] = factor.value
    return total


def split_balance(total: Tensor) -> BalanceSums:
    """The sums of all ranks, taken apart."""
    losses = total.size(1) // 2
    return BalanceSums(total[:, :losses], total[:, losses:])


def balance_metrics(
    sums: BalanceSums, microbatches: Tensor, experiment: Experiment, detailed: bool
) -> dict[str, Any]:
    """The losses' part of a step's record.

    Args:
        microbatches: [layers] of the global batch; 0 where a layer is dense.
        detailed: whether the lists a layer are asked for.
    """
    moe = experiment.moe
    assert moe is not None
    there = microbatches > 0
    means = sums.losses[there] / microbatches[there, None]
    record: dict[str, Any] = {
        f"moe/loss/{name}": float(mean) for name, mean in zip(losses_of(moe), means.mean(0), strict=True)
    }
    if detailed:
        for name, column in _reported(moe).items():
            values = sums.coefficients[:, column].tolist() if column is not None else [0.0] * len(there)
            pairs = zip(values, there.tolist(), strict=True)
            record[f"moe/per_layer/{name}_coeff"] = [value if moe else math.nan for value, moe in pairs]
    return record


def _reported(moe: MoE) -> dict[str, int | None]:
    """Name of each list of coefficients -> its column; None: there is no such loss.

    `aux_loss` is there always: the first loss stands for it where it is not among them. A z-loss with a
    constant weight is the same number in every line and layer.
    """
    names = list(losses_of(moe))
    columns: dict[str, int | None] = {name: column for column, name in enumerate(names)}
    if "aux_loss" not in columns:
        columns = {"aux_loss": columns.pop(names[0]) if names else None, **columns}
    if not isinstance(moe.moe_z_loss_coeff, float | int):
        columns[Z_LOSS] = len(names)
    return columns
