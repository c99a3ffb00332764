"""Top-k of logits with learnt noise (Sparsely-Gated Mixture-of-Experts)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.gates.selection import largest, weighed


class NoisyTopK(Gate):
    """The k largest of H = z + N(0, 1) * softplus(x W_noise) in training, of the logits z in evaluation
    (Shazeer et al. 2017, eqs. 3 to 5). `Choice.load` is their P(x, i), eqs. 8 and 9.

    Parameters:
        noise_weight: [e, h], zeros at the start.
    """

    needs_marks = True

    def __init__(self, moe: MoE, hidden_size: int) -> None:
        super().__init__(moe, hidden_size)
        self.noise_weight = torch.nn.Parameter(torch.zeros(moe.num_moe_experts, hidden_size))

    def forward(self, given: GateInput) -> Choice:
        if not self.training:
            return weighed(self.moe, given.logits, largest(self.moe, given.logits))
        deviation = F.softplus(F.linear(given.hidden, self.noise_weight.to(given.hidden.dtype)))
        noise = given.draws.normal("noise", self.moe.num_moe_experts).to(deviation.dtype)
        noisy = given.logits + noise * deviation
        experts = largest(self.moe, noisy.detach())
        return replace(
            weighed(self.moe, noisy, experts), load=_load(given.logits, noisy, deviation, experts.size(1))
        )


def _load(logits: Tensor, noisy: Tensor, deviation: Tensor, k: int) -> Tensor:
    """[t, e] Phi((z_i - kth largest of H without H_i) / deviation_i): how probably expert i would be among
    the k largest if its own noise were drawn again."""
    if k == logits.size(1):
        return torch.ones_like(logits)
    best = noisy.topk(k + 1, dim=-1).values
    kth, next_one = best[:, k - 1 : k], best[:, k:]
    threshold = torch.where(noisy >= kth, next_one, kth)
    return torch.special.ndtr((logits - threshold) / deviation)
