"""The sequence-wise balancing loss of DeepSeek-V3."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput


def seq_aux_loss(given: LossInput) -> Tensor:
    """The mean over the b sequences of sum_j f_j P_j, f_j = e / (k s) times the assignments and P_j the mean
    score of expert j within a sequence of s valid tokens (DeepSeek-V3, eqs. 17 to 20). 1 at perfect balance.

    The sequences of a batch don't act on each other, so that neither do microbatches. A sequence that is
    padding alone adds 0.
    """
    microbatch, scores = given.microbatch, given.choice.scores
    places = (microbatch.length, microbatch.batch, -1)
    there = microbatch.masked(scores.new_ones(len(scores), 1))
    counts = torch.cat([given.routed.to(scores.dtype), there], dim=1).view(places).sum(0)
    assigned, tokens = microbatch.sum(counts).split([given.num_experts, 1], dim=1)
    tokens = tokens.clamp(min=1.0)
    mean_scores = microbatch.total(microbatch.masked(scores).view(places).sum(0)) / tokens
    of_sequences = (assigned / (tokens * given.moe.moe_router_topk) * mean_scores).sum(1)
    return given.num_experts * of_sequences.mean()
