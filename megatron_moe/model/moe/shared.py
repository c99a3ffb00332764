"""Experts that every token passes, without Megatron-Core."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.model.activations import ACTIVATIONS


class SharedExperts(torch.nn.Module):
    """fc2(act(fc1 x)), weighed by sigmoid(gate x) where it has a gate (DeepSeek-MoE; Qwen2-MoE).

    Args:
        hidden_size: h.
        width: f, inner width of all shared experts together.
        activation: a name of `activations.ACTIVATIONS`.
        gated: whether a gate weighs the output.
        std: standard deviation of the initial weights.

    Parameters:
        linear_fc1: [g * f, h], g = 2 where the activation is gated. linear_fc2: [h, f]. gate: [1, h].
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        activation: str,
        gated: bool,
        std: float,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]

        def weight(rows: int, columns: int) -> torch.nn.Parameter:
            empty = torch.empty(rows, columns, dtype=dtype, device=device)
            return torch.nn.Parameter(torch.nn.init.normal_(empty, std=std))

        self.linear_fc1 = weight(width * (2 if self.activation.is_gated else 1), hidden_size)
        self.linear_fc2 = weight(hidden_size, width)
        self.gate = weight(1, hidden_size) if gated else None

    def forward(self, tokens: Tensor) -> Tensor:
        """[t, h] -> [t, h]."""
        inner = self.activation.apply(F.linear(tokens, self.linear_fc1))
        output = F.linear(inner, self.linear_fc2)
        return output if self.gate is None else output * F.linear(tokens, self.gate).sigmoid()
