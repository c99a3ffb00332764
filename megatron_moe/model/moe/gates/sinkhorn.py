"""Experts balanced by Sinkhorn's iteration."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput

TOLERANCE = 1e-4
"""Mean change of a factor at which the iteration ends."""
MOST_ITERATIONS = 100


class Sinkhorn(Gate):
    """In training the k largest of exp(z_ij) * d_j, where the factors d make the columns' sums equal beside
    equal row sums, over all targets of the microbatch; in evaluation the k largest logits (BASE layers, as
    Megatron-LM has them). Weights are the softmax over all experts, for k = 1 the sigmoid of the logit: the
    factors pass no gradient."""

    def forward(self, given: GateInput) -> Choice:
        k, values = self.moe.moe_router_topk, given.logits.detach()
        if self.training:
            values = values + balance(self._logits_of_targets(given))
        experts = values.topk(k, dim=-1).indices
        scores = given.logits.softmax(-1)
        weights = scores.gather(1, experts) if k > 1 else given.logits.gather(1, experts).sigmoid()
        return Choice(experts, weights, scores)

    @staticmethod
    def _logits_of_targets(given: GateInput) -> Tensor:
        """[targets, e] of the whole microbatch: the same sums in every layout."""
        logits = given.microbatch.gather(given.logits.detach())
        valid = given.microbatch.valid
        return logits if valid is None else logits[given.microbatch.gather(valid)]


def balance(logits: Tensor) -> Tensor:
    """[e] logarithms of the factors of the experts, for logits [t, e]; zeros where there is no token.

    Works with logarithms, so that no logit is too large for it.
    """
    tokens, experts = logits.shape
    factors = logits.new_zeros(experts)
    for _ in range(MOST_ITERATIONS if tokens else 0):
        rows = -math.log(tokens) - (logits + factors).logsumexp(1)
        before, factors = factors, -math.log(experts) - (logits + rows[:, None]).logsumexp(0)
        if float((factors.exp() - before.exp()).abs().mean()) <= TOLERANCE:
            break
    return factors
