"""Where the gradient of the experts' weights is written on a host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

REUSED_BYTES = 32 << 20
"""Gradients from this size on use the memory of the last one. The C library gives smaller ones memory that
was used before, too; larger ones get fresh pages each time, which takes up to a fifth of a layer's time."""

_memory = WeakTensorKeyDictionary()


class WeightGradient:
    """The gradient of a weight [e, out, in], written product by product.

    Where Megatron-Core's gradient buffer holds a place for it, `main_grad`, products are added there at once,
    which saves writing a gradient, reading it and adding it. Megatron-Core knows this from its fused kernels:
    `grad_added_to_main_grad` keeps its hook from adding what autograd is given, which is empty.
    """

    def __init__(self, weight: Tensor, needed: bool) -> None:
        self.weight, self.needed = weight, needed
        main = _place_of(weight)
        self.adds = needed and main is not None
        self.gradient: Tensor | None = None
        target = main
        if self.adds:
            self.gradient = torch.empty_like(weight)
        elif needed:
            self.gradient = target = memory_for(weight)
        self.parts = () if not needed or target is None else target.unbind()

    def add(self, expert: int, left: Tensor, right: Tensor) -> None:
        """The product is this expert's; each expert has one."""
        if self.adds:
            self.parts[expert].addmm_(left, right)
        elif self.needed:
            torch.mm(left, right, out=self.parts[expert])

    def whole(self) -> Tensor | None:
        """What autograd is to be given."""
        if self.adds:
            self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return self.gradient


def split(weight: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """`weight.split(sizes)`, whose parts' gradients are added to Megatron-Core's buffer as the whole one's
    would be: bit by bit the same."""
    main = _place_of(weight)
    if main is None or not torch.is_grad_enabled() or not weight.requires_grad:
        return weight.split(sizes)
    parts: tuple[Tensor, ...] = _Split.apply(weight, sizes)
    for part, place in zip(parts, main.split(sizes), strict=True):
        part.main_grad = place  # type: ignore[attr-defined]
    return parts


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.weight = weight
        return weight.split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.weight.grad_added_to_main_grad = True
        return torch.empty_like(ctx.weight), None


def _place_of(weight: Tensor) -> Tensor | None:
    """Where products can be added in Megatron-Core's buffer, [e, out, in]; None where there is no place of
    the weight's precision."""
    main: Tensor | None = getattr(weight, "main_grad", None)
    return main if main is not None and main.dtype == weight.dtype else None


def memory_for(weight: Tensor) -> Tensor:
    """An uninitialised tensor like `weight`: the memory of the one before, if nobody holds that any more."""
    if not weight.is_leaf or weight.nbytes < REUSED_BYTES:
        return torch.empty_like(weight)
    last = _memory.get(weight)
    if last is None or last.shape != weight.shape or last.dtype != weight.dtype or _is_held(last):
        last = _memory[weight] = torch.empty_like(weight)
    # Another tensor over the same memory, so that autograd sees one that is its own and need not be copied.
    fresh: Tensor = last.detach()
    return fresh


def _is_held(tensor: Tensor) -> bool:
    """Whether other tensors, views and arrays too, share the memory. 2: `tensor`, and this question."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2
