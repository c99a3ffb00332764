"""What every contender is made of: the shape of the problem, weights, and a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Missing(Exception):
    """A contender that cannot take part here; the message says why."""


@dataclass(frozen=True)
class Shape:
    """Of one MoE layer with SwiGLU experts.

    Attributes:
        experts: e. topk: k. hidden: h. width: inner width f of one expert. tokens: t, of all ranks together.
    """

    experts: int
    topk: int
    hidden: int
    width: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "e,k,h,f,t"."""
        return cls(*(int(number) for number in text.split(",")))

    def __str__(self) -> str:
        return f"({self.experts}, {self.topk}, {self.hidden}, {self.width}, {self.tokens})"

    @property
    def flops(self) -> float:
        """Forward and backward, multiplications and additions, of the experts."""
        return 3 * 6.0 * self.tokens * self.topk * self.hidden * self.width

    def moved_bytes(self, item_bytes: int) -> float:
        """Read and written at least: weights read forward and backward and their gradients written; tokens
        brought to experts and back, forward and backward, each time read and written."""
        weights = 3 * self.experts * self.hidden * self.width
        return item_bytes * (3.0 * weights + 8.0 * self.tokens * self.topk * self.hidden)


ON_A_CPU = ("8,2,512,1024,4096", "64,2,512,1024,4096", "64,8,512,256,4096", "128,1,256,512,8192")
ON_A_GPU = ("8,2,4096,14336,16384", "64,6,2048,1408,16384", "128,8,2048,768,16384")


@dataclass(frozen=True)
class Problem:
    """One shape with weights that the contenders share.

    Attributes:
        router: [e, h]. fc1: [e, 2 f, h], the gate's rows first. fc2: [e, h, f].
        rank, ranks: of the process group.
    """

    shape: Shape
    router: Tensor
    fc1: Tensor
    fc2: Tensor
    rank: int = 0
    ranks: int = 1

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, device: torch.device, rank: int, ranks: int) -> Problem:
        """Weights that keep the size of activations, the same on all ranks."""
        torch.manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device, dtype=dtype) * sizes[-1] ** -0.5

        experts, hidden, width = shape.experts, shape.hidden, shape.width
        router = normal(experts, hidden)
        fc1, fc2 = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
        return cls(shape, router, fc1, fc2, rank, ranks)

    @property
    def tokens(self) -> int:
        """Of this rank."""
        return self.shape.tokens // self.ranks


@dataclass
class Contender:
    """One way to compute the layer.

    Attributes:
        forward: [t, h] -> [t, h].
        parameters: whose gradients are thrown away between turns.
        tokens: it is given so many, and its time counts as often as they go into all; None: all.
        rounds: it takes part in so many; None: all.
        clean: called after the backward pass; not timed.
        same: it computes what the formula says.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    tokens: int | None = None
    rounds: int | None = None
    clean: Callable[[], Any] = field(default=lambda: None)
    same: bool = True


Maker = Callable[[Problem], Contender]
"""Raises Missing where a contender cannot take part."""


def of_module(name: str, module: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Contender:
    """A contender whose gradients are those of a module."""
    return Contender(name, forward, list(module.parameters()))
