"""Feed-forward experts on a host, at the speed of its matrix products.

Block by block, tokens are gathered, computed and added to the result, in what the processor's caches hold:
neither sorted tokens nor activations nor sorted outputs are ever written to memory as a whole. Autograd over
single operations would write and read each of them, and fill fresh memory each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_moe.model.activations import ACTIVATIONS, QUICK_GELU
from megatron_moe.model.moe.host_workers import in_threads, workers
from megatron_moe.model.moe.weight_gradient import WeightGradient

BLOCK_ROWS = 512
"""Experts with few tokens share a block up to so many rows: fewer and larger steps between the products."""

BLOCKS_PER_WORKER = 4
"""Rows for so many blocks as long as the longest: with fewer, one worker may compute the last one while the
others wait."""

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class HostActivation:
    """An activation that writes into given memory.

    Attributes:
        value: (x, out): its value.
        gradient: (gradient of the value, x, out): gradient of x.
        limit, offset: see `activations.Activation`; `value` and `gradient` know of the gate's limit.
    """

    value: Callable[[Tensor, Tensor], Any]
    gradient: Callable[[Tensor, Tensor, Tensor], Any]
    limit: float | None = None
    offset: float = 0.0

    def factor(self, up: Tensor) -> Tensor:
        """What a gated activation multiplies by."""
        if self.limit is None:
            return up
        return up.clamp(-self.limit, self.limit).add_(self.offset)

    def back_through_factor(self, grad: Tensor, up: Tensor) -> None:
        """Make of the gradient of `factor`, in place, that of the up-projection."""
        if self.limit is not None:
            grad.masked_fill_(up.abs() > self.limit, 0)


_SILU = HostActivation(
    lambda x, out: _aten.silu.out(x, out=out),
    lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
)
_GELU = HostActivation(
    lambda x, out: _aten.gelu.out(x, out=out),
    lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
)


def _clamped(name: str) -> HostActivation:
    """Plainly: it takes fresh memory for each block."""
    known = ACTIVATIONS[name]
    limit = known.limit
    assert limit is not None

    def gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
        sigmoid = torch.sigmoid(QUICK_GELU * x.clamp(max=limit))
        torch.mul(sigmoid, 1 + QUICK_GELU * x * (1 - sigmoid), out=out)
        out.mul_(grad).masked_fill_(x > limit, 0)

    def value(x: Tensor, out: Tensor) -> None:
        out.copy_(known.function(x.clamp(max=limit)))

    return HostActivation(value, gradient, limit, known.offset)


HOST_ACTIVATIONS = {
    "swiglu": _SILU,
    "geglu": _GELU,
    "clamped_swiglu": _clamped("clamped_swiglu"),
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
        number: from 0.
        rows: of all rows.
        experts: their numbers.
        sizes: rows of each.
    """

    number: int
    rows: slice
    experts: range
    sizes: list[int]

    @property
    def length(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def of_each(self, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
        """For each expert its number, and its part of each of these tensors over the block's rows."""
        return zip(self.experts, *(x.split(self.sizes) for x in rows), strict=True)


def _blocks(sizes: list[int]) -> list[_Block]:
    blocks: list[_Block] = []
    first = start = length = 0
    for expert, size in enumerate([*sizes, BLOCK_ROWS + 1]):
        if expert > first and length + size > BLOCK_ROWS:
            rows, experts = slice(start, start + length), range(first, expert)
            blocks.append(_Block(len(blocks), rows, experts, sizes[first:expert]))
            first, start, length = expert, start + length, 0
        length += size
    return blocks


def _for_each(blocks: list[_Block], work: Callable[[Iterator[_Block]], None]) -> None:
    longest, rows = max(block.length for block in blocks), blocks[-1].rows.stop
    if workers() > 1 and longest * BLOCKS_PER_WORKER * workers() <= rows:
        in_threads(work, blocks)
    else:
        work(iter(blocks))


class _Memory:
    """Memory that one block after the other uses, [rows of the longest block, width]."""

    def __init__(self, blocks: list[_Block], like: Tensor) -> None:
        self.rows, self.like = max(block.length for block in blocks), like

    def __call__(self, width: int) -> Tensor:
        return self.like.new_empty(self.rows, width)


class _Sums:
    """What the experts make of the tokens, [t, h] or without `sources` [n, h].

    Rows are added in the order of the blocks, whichever is done first, so that sums are always the same.
    """

    def __init__(self, tokens: Tensor, sources: Tensor | None, blocks: list[_Block], memory: _Memory) -> None:
        self.sources, self.blocks, self.memory = sources, blocks, memory
        self.sums = torch.empty_like(tokens) if sources is None else torch.zeros_like(tokens)
        self._lock, self._next, self._done = Lock(), 0, set[int]()
        self._places: dict[int, Tensor] = {}
        self._spare: list[Tensor] = []

    def place(self, block: _Block) -> Tensor:
        """Where to write a block's rows, uninitialised."""
        if self.sources is None:
            return self.sums[block.rows]
        with self._lock:
            place = self._spare.pop() if self._spare else self.memory(self.sums.size(1))
            self._places[block.number] = place
        return place[: block.length]

    def add(self, block: _Block) -> None:
        """The block's rows are written."""
        if self.sources is None:
            return
        with self._lock:
            self._done.add(block.number)
            while self._next in self._done:
                rows, place = self.blocks[self._next].rows, self._places.pop(self._next)
                self.sums.index_add_(0, self.sources[rows], place[: rows.stop - rows.start])
                self._spare.append(place)
                self._next += 1


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
        inner = tokens.new_empty(len(weights), fc1.size(1)) if keep else None
        sums, functions = _Sums(tokens, sources, blocks, memory), HOST_ACTIVATIONS[activation]
        ins, outs = [w.t() for w in fc1.unbind()], [w.t() for w in fc2.unbind()]

        def work(mine: Iterator[_Block]) -> None:
            gathered = None if sources is None else memory(hidden)
            before_of_block = memory(fc1.size(1)) if inner is None else inner
            activated = memory(width)
            for block in mine:
                x, y = _rows(tokens, sources, block, gathered), sums.place(block)
                before = before_of_block[: block.length] if inner is None else inner[block.rows]
                for expert, x_e, before_e in block.of_each(x, before):
                    torch.mm(x_e, ins[expert], out=before_e)
                after = activated[: block.length]
                functions.value(before[:, :width], after)
                if gated:
                    after *= functions.factor(before[:, width:])
                after *= weights[block.rows, None]
                for expert, after_e, y_e in block.of_each(after, y):
                    torch.mm(after_e, outs[expert], out=y_e)
                sums.add(block)

        _for_each(blocks, work)
        if keep:
            ctx.save_for_backward(tokens, weights, fc1, fc2, inner, sources)
            ctx.settings = activation, blocks
        return sums.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, fc1, fc2, inner, sources = ctx.saved_tensors
        activation, blocks = ctx.settings
        needs_tokens, _, needs_fc1, needs_fc2, *_ = ctx.needs_input_grad
        width, hidden, gated = fc2.size(2), tokens.size(1), fc1.size(1) != fc2.size(2)
        memory, functions = _Memory(blocks, tokens), HOST_ACTIVATIONS[activation]
        sums = _Sums(tokens, sources, blocks, memory) if needs_tokens else None
        grad_weights = torch.empty_like(weights)
        grad_fc1, grad_fc2 = WeightGradient(fc1, needs_fc1), WeightGradient(fc2, needs_fc2)
        ins, outs = fc1.unbind(), fc2.unbind()

        def work(mine: Iterator[_Block]) -> None:
            gathered, gathered_grads = (None if sources is None else memory(hidden) for _ in "12")
            after_grads, activated, value = memory(width), memory(width), memory(width)
            before_grads = memory(fc1.size(1))
            for block in mine:
                of_block, dy = slice(0, block.length), _rows(grads[0], sources, block, gathered_grads)
                p, before, after = weights[block.rows, None], inner[block.rows], activated[of_block]
                da, db = after_grads[of_block], before_grads[of_block]
                for expert, dy_e, da_e in block.of_each(dy, da):
                    torch.mm(dy_e, outs[expert], out=da_e)
                # What the forward pass computed, without p.
                first = value[of_block] if gated else after
                functions.value(before[:, :width], first)
                factor = functions.factor(before[:, width:]) if gated else None
                if factor is not None:
                    torch.mul(first, factor, out=after)
                torch.linalg.vecdot(da.to(p.dtype), after.to(p.dtype), out=grad_weights[block.rows])
                after *= p
                for expert, dy_e, after_e in block.of_each(dy, after):
                    grad_fc2.add(expert, dy_e.t(), after_e)
                da *= p
                if factor is not None:
                    torch.mul(da, first, out=db[:, width:])
                    functions.back_through_factor(db[:, width:], before[:, width:])
                    da *= factor
                functions.gradient(da, before[:, :width], db[:, :width])
                if needs_fc1:
                    x = _rows(tokens, sources, block, gathered)
                    for expert, db_e, x_e in block.of_each(db, x):
                        grad_fc1.add(expert, db_e.t(), x_e)
                if sums is not None:
                    for expert, db_e, dx_e in block.of_each(db, sums.place(block)):
                        torch.mm(db_e, ins[expert], out=dx_e)
                    sums.add(block)

        _for_each(blocks, work)
        of_tokens = None if sums is None else sums.sums
        return of_tokens, grad_weights, grad_fc1.whole(), grad_fc2.whole(), None, None, None, None


def _rows(tokens: Tensor, sources: Tensor | None, block: _Block, memory: Tensor | None) -> Tensor:
    """The rows of a block, gathered into `memory` where they are not there one after the other already."""
    if sources is None or memory is None:
        return tokens[block.rows]
    return torch.index_select(tokens, 0, sources[block.rows], out=memory[: block.length])
