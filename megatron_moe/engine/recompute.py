"""Outputs that are thrown away after their last use in the forward pass, and computed again for the backward
pass.

Megatron-Core has a class for this, `CheckpointWithoutOutput`, which recomputes norms and activations. It
takes Transformer Engine for granted, and from 0.19 on compiles an extension in C++ when it first recomputes
(seen with 0.16.1 and 0.19.2); this one needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def use_for_norms() -> None:
    """Let Megatron-Core's layers recompute their norms with `DiscardedOutput`."""
    from megatron.core import tensor_parallel

    tensor_parallel.CheckpointWithoutOutput = DiscardedOutput


class DiscardedOutput:
    """One output that its users keep for the backward pass, though its memory is free in between.

    First `checkpoint`, then everything that uses the output, then `discard_output_and_register_recompute`.
    The function must draw no random numbers. Does nothing where no gradients are recorded.
    """

    def __init__(self) -> None:
        self._function: Callable[..., Tensor] | None = None
        self._node: Any = None
        self._output: Tensor | None = None

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """function(*inputs), of which only the inputs are kept."""
        if not torch.is_grad_enabled():
            return function(*inputs)
        self._function = function
        output: Tensor = _Recomputed.apply(self, *inputs)
        self._output = output
        return output

    def discard_output_and_register_recompute(self, later: Tensor) -> None:
        """Free the output; it is there again once `later`, made from it, has its gradient."""
        if self._output is not None:
            self._output.untyped_storage().resize_(0)
            later.register_hook(self._recompute)

    def run(self, node: Any, *inputs: Tensor | None) -> Tensor:
        """The forward pass of the output, which belongs to `node` of autograd's graph."""
        assert self._function is not None
        self._node = node
        return self._function(*inputs)

    def _recompute(self, gradient: Tensor) -> None:
        assert self._function is not None and self._output is not None
        node = self._node
        inputs = [
            saved if saved is None else saved.detach().requires_grad_(saved.requires_grad)
            for saved in node.saved_tensors
        ]
        with torch.enable_grad():
            output = self._function(*inputs)
        # Into the memory behind the tensor: whoever saved it, or a view of it, has it back, and autograd sees
        # no change of it.
        with torch.no_grad():
            memory, again = self._output.untyped_storage(), output.untyped_storage()
            memory.resize_(again.size())
            memory.copy_(again)
        node.inputs, node.output = inputs, output
        self._function = self._node = self._output = None


class _Recomputed(torch.autograd.Function):
    """A function whose graph is made in the backward pass."""

    @staticmethod
    def forward(ctx: Any, owner: DiscardedOutput, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        return owner.run(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, output = ctx.inputs, ctx.output
        ctx.inputs = ctx.output = None
        # Not autograd.grad: the gradients of the function's weights go where all weights' do.
        torch.autograd.backward(output, gradients)
        return (None, *(None if x is None else x.grad for x in inputs))
