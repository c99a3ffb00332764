"""Feed-forward experts on a host, at the speed of its matrix products.

Block by block, tokens are gathered, computed and added to the result, in what the processor's caches hold:
neither sorted tokens nor activations nor sorted outputs are ever written to memory as a whole. Autograd over
single operations would write and read each of them, and fill fresh memory each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_moe.model.moe.weight_gradient import WeightGradient

BLOCK_ROWS = 512
"""Experts with few tokens share a block up to so many rows: fewer and larger steps between the products."""

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class HostActivation:
    """An activation that writes into given memory.

    Attributes:
        value: (x, out): its value.
        gradient: (gradient of the value, x, out): gradient of x.
    """

    value: Callable[[Tensor, Tensor], Any]
    gradient: Callable[[Tensor, Tensor, Tensor], Any]


_SILU = HostActivation(
    lambda x, out: _aten.silu.out(x, out=out),
    lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
)
_GELU = HostActivation(
    lambda x, out: _aten.gelu.out(x, out=out),
    lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
)
HOST_ACTIVATIONS = {
    "swiglu": _SILU,
    "geglu": _GELU,
    "gelu": _GELU,
    "relu": HostActivation(
        lambda x, out: torch.clamp(x, min=0, out=out),
        lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
    "squared_relu": HostActivation(
        lambda x, out: torch.clamp(x, min=0, out=out).square_(),
        lambda grad, x, out: torch.clamp(x, min=0, out=out).mul_(grad).mul_(2),
    ),
}
"""For each name in `activations.ACTIVATIONS`."""


def expert_loop(
    tokens: Tensor,
    weights: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    activation: str,
    sizes: list[int],
    sources: Tensor | None = None,
) -> Tensor:
    """p * fc2_e act(fc1_e x) of each row.

    Keeps for the backward pass only `tokens` and the rows behind fc1.

    Args:
        tokens: [t, h].
        weights: [n] gate weights p.
        fc1: [e, g * f, h], g = 2 where the activation is gated: the gate's rows before the up-projection's.
        fc2: [e, h, f].
        activation: a name of `activations.ACTIVATIONS`.
        sizes: rows of each expert, n together, those of expert 0 first.
        sources: [n] which token each row is a copy of; None: row i is token i.

    Returns:
        With `sources` [t, h], each token's rows added up; else [n, h].
    """
    assert sum(sizes) == len(weights), "rows of no expert would stay uninitialised"
    keep = torch.is_grad_enabled()
    result: Tensor = _ExpertLoop.apply(tokens, weights, fc1, fc2, activation, sizes, sources, keep)
    return result


@dataclass(frozen=True)
class _Block:
    """Rows of neighbouring experts.

    Attributes:
        rows: of all rows.
        experts: for each expert its number, and its rows within the block.
    """

    rows: slice
    experts: list[tuple[int, slice]]

    @property
    def length(self) -> int:
        return int(self.rows.stop - self.rows.start)


def _blocks(sizes: list[int]) -> list[_Block]:
    blocks: list[_Block] = []
    experts: list[tuple[int, slice]] = []
    start = length = 0
    for expert, size in enumerate(sizes):
        if experts and length + size > BLOCK_ROWS:
            blocks.append(_Block(slice(start, start + length), experts))
            start, length, experts = start + length, 0, []
        experts.append((expert, slice(length, length + size)))
        length += size
    return [*blocks, _Block(slice(start, start + length), experts)]


class _Memory:
    """Memory that one block after the other uses, [rows of the longest block, width]."""

    def __init__(self, blocks: list[_Block], like: Tensor) -> None:
        self.rows, self.like = max(block.length for block in blocks), like

    def __call__(self, width: int) -> Tensor:
        return self.like.new_empty(self.rows, width)


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        activation: str,
        sizes: list[int],
        sources: Tensor | None,
        keep: bool,
    ) -> Tensor:
        blocks, width, hidden = _blocks(sizes), fc2.size(2), tokens.size(1)
        memory, gated = _Memory(blocks, tokens), fc1.size(1) != width
        inner = tokens.new_empty(len(weights), fc1.size(1)) if keep else memory(fc1.size(1))
        gathered, products = (memory(hidden), memory(hidden)) if sources is not None else (None, None)
        result = torch.zeros_like(tokens) if sources is not None else torch.empty_like(tokens)
        activated, value = memory(width), HOST_ACTIVATIONS[activation].value
        ins, outs = [w.t() for w in fc1.unbind()], [w.t() for w in fc2.unbind()]
        for block in blocks:
            x = _rows(tokens, sources, block, gathered)
            before = inner[block.rows] if keep else inner[: block.length]
            for expert, rows in block.experts:
                torch.mm(x[rows], ins[expert], out=before[rows])
            after = activated[: block.length]
            value(before[:, :width], after)
            if gated:
                after *= before[:, width:]
            after *= weights[block.rows, None]
            y = result[block.rows] if products is None else products[: block.length]
            for expert, rows in block.experts:
                torch.mm(after[rows], outs[expert], out=y[rows])
            if sources is not None:
                result.index_add_(0, sources[block.rows], y)
        if keep:
            ctx.save_for_backward(tokens, weights, fc1, fc2, inner, sources)
            ctx.settings = activation, blocks
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, fc1, fc2, inner, sources = ctx.saved_tensors
        activation, blocks = ctx.settings
        needs_tokens, _, needs_fc1, needs_fc2, *_ = ctx.needs_input_grad
        width, hidden, gated = fc2.size(2), tokens.size(1), fc1.size(1) != fc2.size(2)
        memory, functions = _Memory(blocks, tokens), HOST_ACTIVATIONS[activation]
        gathered, gathered_grads, products = (memory(hidden) if sources is not None else None for _ in "123")
        after_grads, activated, value = memory(width), memory(width), memory(width)
        before_grads = memory(fc1.size(1))
        grad_tokens = None
        if needs_tokens:
            grad_tokens = torch.zeros_like(tokens) if sources is not None else torch.empty_like(tokens)
        grad_weights = torch.empty_like(weights)
        grad_fc1, grad_fc2 = WeightGradient(fc1, needs_fc1), WeightGradient(fc2, needs_fc2)
        ins, outs = fc1.unbind(), fc2.unbind()
        for block in blocks:
            of_block = slice(0, block.length)
            p, before, after = weights[block.rows, None], inner[block.rows], activated[of_block]
            dy, da, db = (
                _rows(grads[0], sources, block, gathered_grads),
                after_grads[of_block],
                before_grads[of_block],
            )
            for expert, rows in block.experts:
                torch.mm(dy[rows], outs[expert], out=da[rows])
            # What the forward pass computed, without p.
            first = value[of_block] if gated else after
            functions.value(before[:, :width], first)
            if gated:
                torch.mul(first, before[:, width:], out=after)
            torch.linalg.vecdot(da.to(p.dtype), after.to(p.dtype), out=grad_weights[block.rows])
            after *= p
            for expert, rows in block.experts:
                grad_fc2.add(expert, dy[rows].t(), after[rows])
            da *= p
            if gated:
                torch.mul(da, first, out=db[:, width:])
                da *= before[:, width:]
            functions.gradient(da, before[:, :width], db[:, :width])
            if needs_fc1:
                x = _rows(tokens, sources, block, gathered)
                for expert, rows in block.experts:
                    grad_fc1.add(expert, db[rows].t(), x[rows])
            if grad_tokens is not None:
                dx = grad_tokens[block.rows] if products is None else products[of_block]
                for expert, rows in block.experts:
                    torch.mm(db[rows], ins[expert], out=dx[rows])
                if sources is not None:
                    grad_tokens.index_add_(0, sources[block.rows], dx)
        return grad_tokens, grad_weights, grad_fc1.whole(), grad_fc2.whole(), None, None, None, None


def _rows(tokens: Tensor, sources: Tensor | None, block: _Block, memory: Tensor | None) -> Tensor:
    """The rows of a block, gathered into `memory` where they are not there one after the other already."""
    if sources is None or memory is None:
        return tokens[block.rows]
    return torch.index_select(tokens, 0, sources[block.rows], out=memory[: block.length])
