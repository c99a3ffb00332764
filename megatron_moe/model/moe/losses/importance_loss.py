"""The importance loss of the Sparsely-Gated Mixture of Experts."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput
from megatron_moe.model.moe.losses.variation import squared_variation


def importance_loss(given: LossInput) -> Tensor:
    """CV^2 over the experts of the sums of their gate weights (Shazeer et al. 2017, eqs. 6 and 7)."""
    choice = given.choice
    weights = choice.weights if choice.chosen is None else choice.weights.masked_fill(~choice.chosen, 0)
    dense = weights.new_zeros(len(weights), given.num_experts).scatter(1, choice.experts, weights)
    return squared_variation(given.microbatch.total(given.microbatch.masked(dense).sum(0)))
