"""Every expert gets the same number of tokens: for benchmarks."""

from __future__ import annotations

import torch

from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.gates.selection import weighed


class ForcedBalance(Gate):
    """The targets of a microbatch in a random order take the experts in turn, k each, so that the experts'
    loads differ by 1 at most. Weights are those that the logits give these experts, so that the router has
    the gradients of any other."""

    needs_marks = True

    def forward(self, given: GateInput) -> Choice:
        experts, k, microbatch = self.moe.num_moe_experts, self.moe.moe_router_topk, given.microbatch
        lots = given.draws.uniform("turn", 1).squeeze(1)
        if microbatch.valid is not None:
            lots = lots + (~microbatch.valid).float()
        turns = microbatch.mine(microbatch.gather(lots).argsort(stable=True).argsort())
        places = turns[:, None] * k + torch.arange(k, device=turns.device)
        # Neighbours lie on one rank: a random order spreads each token's experts as routers would.
        order = given.draws.permutation("order of experts", experts)
        return weighed(self.moe, given.logits, order[places % experts])
