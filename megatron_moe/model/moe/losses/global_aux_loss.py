"""The balancing loss over the global batch."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.losses.loss import LossInput


def global_aux_loss(given: LossInput) -> Tensor:
    """e * sum_j f_j P_j, f_j expert j's share of the previous global batch's assignments, 1/e before the
    first, and P_j its mean score in this one (the Switch form, as Qiu et al. 2025 take it over the global
    batch).

    A microbatch brings its part of P: the sum of its scores over the mean number of tokens of the global
    batch's microbatches. So the mean over microbatches and replicas, and its gradient, are those of the
    global batch as one, however it is cut. f is the previous batch's because this one's is not known before
    all of its microbatches have been routed."""
    assert given.previous_fractions is not None
    tokens = given.microbatch.count if given.mean_tokens is None else given.mean_tokens
    fractions = given.previous_fractions.to(given.choice.scores.dtype)
    return given.num_experts * (fractions * given.score_sums).sum() / tokens
