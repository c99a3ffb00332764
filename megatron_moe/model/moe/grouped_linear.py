"""One linear map an expert over tokens sorted by expert, at the speed of the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_linear(tokens: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """y[t] = weight[expert of t] @ x[t], for tokens sorted by expert.

    Args:
        tokens: [t, in], the tokens of expert 0 first.
        weight: [e, out, in].
        tokens_per_expert: [e], summing to t; may hold zeros.

    Returns:
        [t, out].
    """
    if tokens.is_cuda and tokens.dtype == torch.bfloat16 and _rows_are_aligned(weight):
        # No host synchronisation: the offsets stay on the device.
        offsets = tokens_per_expert.to(device=tokens.device).cumsum(0).to(torch.int32)
        return torch.nn.functional.grouped_mm(tokens, weight.transpose(1, 2), offs=offsets)
    sizes: list[int] = tokens_per_expert.tolist()
    assert sum(sizes) == tokens.size(0), "rows of no expert would stay uninitialised"
    return _ExpertLoop.apply(tokens, weight, sizes)


def grouped_bias(bias: Tensor, tokens_per_expert: Tensor, num_tokens: int) -> Tensor:
    """The bias [e, out] of each token's expert, [num_tokens, out], for tokens sorted by expert."""
    experts = torch.arange(len(bias), device=bias.device)
    counts = tokens_per_expert.to(bias.device)
    expert_of_token = torch.repeat_interleave(experts, counts, output_size=num_tokens)
    # A look-up, because its gradient is summed in a fixed order on every device.
    return torch.nn.functional.embedding(expert_of_token, bias)


class ExpertBias(torch.nn.Module):
    """One vector an expert. A module for the parameter's name, `bias`, which takes no weight decay.

    Args:
        bias: [e, out].
    """

    def __init__(self, bias: torch.nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self) -> torch.nn.Parameter:
        """The bias, through the call of a module: its hooks wait for weights that are being gathered."""
        return self.bias


def _rows_are_aligned(weight: Tensor) -> bool:
    """grouped_mm wants rows of a multiple of 16 bytes."""
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])


class _ExpertLoop(torch.autograd.Function):
    """One product an expert, straight into the result: nothing is stacked, split or concatenated.

    On the host this runs at the speed of the dense product. Autograd over `weight[i]` would instead add up a
    gradient of the size of all experts for every expert.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.sizes = sizes
        output = tokens.new_empty(tokens.size(0), weight.size(1))
        for expert, rows in _rows(sizes):
            torch.mm(tokens[rows], weight[expert].t(), out=output[rows])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_output,) = grads
        tokens, weight = ctx.saved_tensors
        grad_tokens = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_tokens = torch.empty_like(tokens)
            for expert, rows in _rows(ctx.sizes):
                torch.mm(grad_output[rows], weight[expert], out=grad_tokens[rows])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for expert, rows in _rows(ctx.sizes):
                torch.mm(grad_output[rows].t(), tokens[rows], out=grad_weight[expert])
        return grad_tokens, grad_weight, None


def _rows(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for each expert; an empty product over no rows gives zeros."""
    result, start = [], 0
    for expert, size in enumerate(sizes):
        result.append((expert, slice(start, start + size)))
        start += size
    return result
