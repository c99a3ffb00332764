"""The balancing loss of Skywork-MoE."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput


def skywork_aux_loss(given: LossInput) -> Tensor:
    """sum_j (1/e - P_j)^2, P_j the mean score of expert j (Skywork-MoE, eq. 4). 0 at perfect balance."""
    return (1 / given.num_experts - given.mean_scores).square().sum()
