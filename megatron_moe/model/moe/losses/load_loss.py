"""The load loss of the Sparsely-Gated Mixture of Experts."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput
from megatron_moe.model.moe.losses.variation import squared_variation


def load_loss(given: LossInput) -> Tensor:
    """CV^2 over the experts of the numbers of tokens that they would get if the noise were drawn again
    (Shazeer et al. 2017, eqs. 10 and 11). Only a gate that draws noise has these."""
    load = given.choice.load
    if load is None:
        raise ValueError("load_loss needs a gate that gives Choice.load, such as noisy_topk")
    return squared_variation(given.microbatch.total(given.microbatch.masked(load).sum(0)))
