"""Experts by the token's number in the vocabulary: nothing to learn."""

from __future__ import annotations

import torch

from megatron_moe.model.moe.draws import key, uniform
from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput


class Hash(Gate):
    """Every e successive numbers of the vocabulary go to e different experts, in a random order of their own
    in each layer, so that each expert gets the same share of the vocabulary (Hash Layers, Roller et al.
    2021). The k experts of a token stand one after the other in this order; weights are 1/k.

    The order depends on the layer only, not on the run's seed: it is part of the model.
    """

    takes_logits = False
    needs_marks = True

    def forward(self, given: GateInput) -> Choice:
        numbers = given.microbatch.tokens
        if numbers is None:
            raise ValueError(
                "the gate `hash` goes by each token's number in the vocabulary: "
                "call the layer with marks (megatron_moe.model.moe.marks.mark)"
            )
        experts, k = self.moe.num_moe_experts, self.moe.moe_router_topk
        drawer = key("hash", given.draws.layer_number)
        orders = uniform(drawer, numbers // experts, experts).argsort(dim=1)
        places = (numbers % experts)[:, None] + torch.arange(k, device=numbers.device)
        chosen = orders.gather(1, places % experts)
        scores = torch.zeros_like(given.logits).scatter(1, chosen, 1 / k)
        return Choice(chosen, scores.gather(1, chosen), scores)
