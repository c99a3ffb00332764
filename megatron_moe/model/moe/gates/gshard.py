"""The gate of GShard."""

from __future__ import annotations

import torch

from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput


class GShard(Gate):
    """The two largest gates g1, g2 of a softmax over all experts, divided by their sum; the second choice is
    made with probability min(1, 2 g2), always in evaluation (Lepikhin et al. 2020, algorithm 1). Where it is
    not made the first one's weight stays g1. First choices are seated first."""

    needs_marks = True

    def forward(self, given: GateInput) -> Choice:
        scores = given.logits.softmax(-1)
        best, experts = scores.topk(2, dim=-1)
        weights = best / best.sum(-1, keepdim=True)
        chosen = None
        if self.training:
            second = given.draws.uniform("second expert", 1) < 2 * weights.detach()[:, 1:]
            chosen = torch.cat([torch.ones_like(second), second], dim=1)
            weights = weights * chosen
        return Choice(experts, weights, scores, chosen, first_choices_first=True)
