"""The k largest scores."""

from __future__ import annotations

from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.gates.selection import largest, weighed


class TopK(Gate):
    """The k largest logits, or with sigmoid scores s the k largest of s + bias: the bias moves the choice and
    not the weights (DeepSeek-V3, eq. 16)."""

    def forward(self, given: GateInput) -> Choice:
        values = given.logits
        if self.moe.moe_router_score_function == "sigmoid":
            values = values.sigmoid()
            if given.bias is not None:
                values = values + given.bias
        return weighed(self.moe, given.logits, largest(self.moe, values.detach()))
