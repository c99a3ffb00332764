"""The gate of Switch Transformer."""

from __future__ import annotations

from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput


class Switch(Gate):
    """The expert of the largest logit, its weight the softmax over all experts (Fedus et al. 2021, eqs. 1 and
    2). The jitter of its input is the router's."""

    def forward(self, given: GateInput) -> Choice:
        scores = given.logits.softmax(-1)
        weights, experts = scores.max(-1, keepdim=True)
        return Choice(experts, weights, scores)
