"""Any module as expert: called for each expert in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError


class ModuleExperts(torch.nn.Module):
    """Experts as modules, each [n, h] -> [n, h]; a tuple's first part counts (Megatron-Core's MLP).

    Slower than `experts.Experts`, which computes experts of a known form together. While gradients are
    recorded an expert without tokens is called with none, n = 0, so that its parameters have gradients on
    every rank.

    Args:
        modules: of this rank.
        first: number of the first one among all experts, for errors.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], first: int = 0) -> None:
        super().__init__()
        self.modules_of_experts = torch.nn.ModuleList(modules)
        self.first = first

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """As `experts.Experts.forward`."""
        return self._compute(range(len(self.modules_of_experts)), tokens, tokens_per_expert, probs)

    def split(self, sizes: list[int]) -> list[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]]:
        """So many of the experts each, to be called as all of them."""
        parts, start = [], 0
        for count in sizes:
            parts.append(self._part(range(start, start + count)))
            start += count
        return parts

    def _part(self, which: range) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]:
        return lambda tokens, counts, probs: self._compute(which, tokens, counts, probs)

    def _compute(
        self, which: range, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        rows = tokens.split(tokens_per_expert.tolist())
        outputs = [
            self._output(number, row)
            for number, row in zip(which, rows, strict=True)
            if len(row) or torch.is_grad_enabled()
        ]
        output = torch.cat(outputs) if outputs else tokens
        return (output * probs.unsqueeze(-1)).to(tokens.dtype), None

    def _output(self, number: int, rows: Tensor) -> Tensor:
        expert = self.modules_of_experts[number]
        output: Any = expert(rows)
        if isinstance(output, tuple) and output:
            output = output[0]
        if not isinstance(output, Tensor) or output.shape != rows.shape:
            given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"expert {self.first + number} ({type(expert).__name__}) returned {given} for input of shape "
                f"{tuple(rows.shape)}; an expert must return a tensor of the shape that it got"
            )
        return output
