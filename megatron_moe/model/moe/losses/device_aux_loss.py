"""DeepSeek-V2's loss that balances the devices which hold the experts."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.device_groups import device_groups
from megatron_moe.model.moe.losses.loss import LossInput


def device_aux_loss(given: LossInput) -> Tensor:
    """sum_i f'_i P'_i over the D groups of experts: f'_i the mean over group i of f_j = e / (k t) times the
    assignments of expert j, P'_i the sum of its experts' mean scores (DeepSeek-V2, eqs. 26 to 28). 1 at
    perfect balance."""
    groups = device_groups(given.moe)
    mean_fractions = given.num_experts * given.fractions.view(groups, -1).mean(1)
    return (mean_fractions * given.mean_scores.view(groups, -1).sum(1)).sum()
