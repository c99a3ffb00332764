"""The balancing loss of GShard."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput
from megatron_moe.model.moe.routing import dense_map


def gshard_aux_loss(given: LossInput) -> Tensor:
    """(1/e) sum_j (c_j / t) m_j, c_j the tokens whose first choice is expert j and m_j its mean score
    (GShard, algorithm 1). 1/e^2 at perfect balance."""
    choice, microbatch = given.choice, given.microbatch
    made = None if choice.chosen is None else choice.chosen[:, :1]
    first = microbatch.masked(dense_map(choice.experts[:, :1], made, given.num_experts))
    counts = microbatch.sum(first.sum(0, dtype=choice.scores.dtype))
    return (counts / microbatch.count * given.mean_scores).mean()
