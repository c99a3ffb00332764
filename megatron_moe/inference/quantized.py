"""Weights in FP8 (E4M3) in memory, made to numbers again where they are used.

Linear layers and experts are; embeddings, the output layer, routers and norms are not. A scale stands for
each matrix, of experts for each expert's gate, up- and down-projection (those of queries, keys and values
share one), or for each block of a matrix where the model came so. Weights that came in FP8 with such scales
get the numbers they came with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.inference.linear import Linear
from megatron_moe.inference.network import Network
from megatron_moe.model.moe.dispatch.dispatcher import SortingExperts
from megatron_moe.model.moe.experts import Experts, Weights
from megatron_moe.model.moe.permutation import Permutation, to_experts, to_tokens

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0
"""Of the numbers of E4M3."""
_NATIVE = (8, 9)
"""Compute capability from which on a GPU multiplies in FP8."""


class Quantized(torch.nn.Module):
    """Matrices [m, r, c] in FP8.

    Args:
        matrices: in any precision, in which they are given back.
        block: rows and columns that have a scale of their own; None: a scale stands for a whole matrix.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, matrices: Tensor, block: Sequence[int] | None) -> None:
        super().__init__()
        count, rows, columns = matrices.shape
        self.dtype = matrices.dtype
        self.block = (rows, columns) if block is None else (min(block[0], rows), min(block[1], columns))
        down, across = -(-rows // self.block[0]), -(-columns // self.block[1])
        self.register_buffer("values", torch.empty(matrices.shape, dtype=FP8, device=matrices.device))
        self.register_buffer("scales", torch.empty(count, down, across, device=matrices.device))
        for number, matrix in enumerate(matrices):
            self._keep(number, matrix.float())

    def _keep(self, number: int, matrix: Tensor) -> None:
        """One after the other: what is made on the way takes a multiple of a matrix."""
        down, across = self.scales.shape[1:]
        rows, columns = matrix.shape
        padded = F.pad(matrix, (0, across * self.block[1] - columns, 0, down * self.block[0] - rows))
        blocks = padded.view(down, self.block[0], across, self.block[1])
        largest = blocks.abs().amax((1, 3))
        scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
        scaled = (blocks / scales[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
        self.values[number] = scaled.view_as(padded)[:rows, :columns].to(FP8)
        self.scales[number] = scales

    def numbers(self, which: Tensor | None = None) -> Tensor:
        """The matrices, or those that `which` [n] counts, in their own precision."""
        values, scales = self.values, self.scales
        if which is not None:
            # Bytes, because FP8 cannot be indexed everywhere.
            values = values.view(torch.uint8).index_select(0, which).view(FP8)
            scales = scales.index_select(0, which)
        found = values.to(self.dtype)
        if scales[0].numel() > 1:
            for dim, length in enumerate(self.block, 1):
                scales = scales.repeat_interleave(length, dim).narrow(dim, 0, found.size(dim))
        return found.mul_(scales.to(self.dtype))


class QuantizedLinear(torch.nn.Module):
    """A `Linear` whose matrix is in FP8. On a GPU with FP8 units, where one scale stands for the matrix, the
    product is one of FP8, of inputs that get a scale each time (not measured: no such GPU was at hand).

    Args:
        parts: matrices that lie one behind the other in it, each with scales of its own.
    """

    def __init__(self, linear: Linear, block: Sequence[int] | None, parts: int) -> None:
        super().__init__()
        self.matrices = Quantized(linear.weight.data.unflatten(0, (parts, -1)), block)
        self.added, self.returned, self.group = linear.added, linear.returned, linear.group
        on_gpu = linear.weight.is_cuda and torch.cuda.get_device_capability() >= _NATIVE
        self.is_native = on_gpu and block is None and not any(n % 16 for n in self.matrices.values.shape[1:])

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        return self.matrices.numbers().flatten(0, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Linear`."""
        output = self._product_of_fp8(x) if self.is_native else F.linear(x, self.weight)
        if self.group is not None:
            dist.all_reduce(output, group=self.group)
        return output if self.added is None else output + self.added, self.returned

    def _product_of_fp8(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        scale = rows.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        scaled, matrices = (rows / scale).to(FP8), self.matrices
        outputs: list[Any] = [
            torch._scaled_mm(scaled, values.t(), scale_a=scale, scale_b=of_values[0, 0], out_dtype=x.dtype)
            for values, of_values in zip(matrices.values, matrices.scales, strict=True)
        ]
        return torch.cat(outputs, dim=-1).view(*x.shape[:-1], -1)


class QuantizedExperts(torch.nn.Module):
    """`Experts` whose matrices are in FP8: those of the experts that tokens came to are made to numbers."""

    def __init__(self, experts: Experts, block: Sequence[int] | None) -> None:
        super().__init__()
        self.of_numbers, self.gates = experts, experts.gates
        by_gate = experts.linear_fc1.data.unflatten(1, (self.gates, -1)).flatten(0, 1)
        self.fc1, self.fc2 = Quantized(by_gate, block), Quantized(experts.linear_fc2.data, block)
        for weight in (experts.linear_fc1, experts.linear_fc2):
            weight.data = weight.new_empty(0)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """As `Experts`."""
        which = tokens_per_expert.nonzero().flatten()
        if not len(which):
            return torch.zeros_like(tokens), None
        return self.of_numbers._compute(self._weights(which), tokens, tokens_per_expert[which], probs)

    def of_unsorted(self, tokens: Tensor, permutation: Permutation, probs: Tensor) -> Tensor:
        """As `Experts`."""
        outputs, _ = self(to_experts(tokens, permutation), permutation.counts, probs)
        return to_tokens(outputs, permutation)

    def _weights(self, which: Tensor) -> Weights:
        """Of these experts."""
        gates = torch.arange(self.gates, device=which.device)
        rows = (which[:, None] * self.gates + gates).flatten()
        fc1 = self.fc1.numbers(rows).unflatten(0, (-1, self.gates)).flatten(1, 2)
        of_all = self.of_numbers
        biases = (None if b is None else b()[which] for b in (of_all.bias_fc1, of_all.bias_fc2))
        return Weights(fc1, self.fc2.numbers(which), *biases)


def quantize(network: Network, block: Sequence[int] | None) -> None:
    """Put the matrices of a network into FP8, layer by layer."""
    for parent in list(network.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear:
                gated = name == "linear_fc1" and network.config.gated_linear_unit
                setattr(parent, name, QuantizedLinear(child, block, parts=2 if gated else 1))
            elif isinstance(child, Experts):
                made = QuantizedExperts(child, block)
                assert isinstance(made, SortingExperts)
                setattr(parent, name, made)
