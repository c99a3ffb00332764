"""The balancing loss of Switch Transformer."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput


def aux_loss(given: LossInput) -> Tensor:
    """e * sum_j f_j P_j, f_j the share of the t * k assignments and P_j the mean score of expert j (Switch
    Transformer, eq. 4). 1 at perfect balance."""
    return given.num_experts * (given.fractions * given.mean_scores).sum()
