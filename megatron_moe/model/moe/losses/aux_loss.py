"""The balancing loss of Switch Transformer."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput


def aux_loss(given: LossInput) -> Tensor:
    """e * sum_j f_j P_j, f_j the share of the t * k assignments and P_j the mean score of expert j (Switch
    Transformer, eq. 4). 1 at perfect balance."""
    microbatch, scores = given.microbatch, given.choice.scores
    assigned = microbatch.sum(given.routed.sum(0, dtype=scores.dtype))
    fraction = assigned / (microbatch.count * given.moe.moe_router_topk)
    mean_score = microbatch.total(microbatch.masked(scores).sum(0)) / microbatch.count
    return scores.size(1) * (fraction * mean_score).sum()
