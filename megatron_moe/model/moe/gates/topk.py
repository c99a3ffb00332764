"""The k largest scores: softmax before or after the selection, or sigmoid with expert biases."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput


class TopK(Gate):
    """`softmax`: the k largest logits, weights their softmax over the k (Mixtral), or with pre-softmax over
    all e (Switch, DeepSeek-V2). `sigmoid`: the k largest of s + bias, weights s over their sum (DeepSeek-V3).
    """

    def forward(self, given: GateInput) -> Choice:
        logits, k = given.logits, self.moe.moe_router_topk
        if self.moe.moe_router_score_function == "sigmoid":
            affinities = logits.sigmoid()
            experts = self.select(affinities if given.bias is None else affinities + given.bias)
            weights = affinities.gather(1, experts)
            if k > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            scores = affinities / (affinities.sum(-1, keepdim=True) + 1e-20)
        else:
            scores = logits.softmax(-1)
            experts = self.select(logits)
            weights = (
                scores.gather(1, experts)
                if self.moe.moe_router_pre_softmax
                else logits.gather(1, experts).softmax(-1)
            )
        if self.moe.moe_router_topk_scaling_factor is not None:
            weights = weights * self.moe.moe_router_topk_scaling_factor
        return Choice(experts, weights, scores)

    def select(self, values: Tensor) -> Tensor:
        """[t, k] the experts of the largest values [t, e], the largest first."""
        return values.topk(self.moe.moe_router_topk, dim=-1).indices
