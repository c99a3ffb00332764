"""Where the gradient of the experts' weights is written on a host."""

from __future__ import annotations

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
        main = getattr(weight, "main_grad", None)
        self.adds = needed and main is not None and main.dtype == weight.dtype
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
