"""Weights that a test made up."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_moe.convert.weights import Weight


class InMemory:
    """A `Weights` over a dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def inventory(self) -> dict[str, Weight]:
        return {name: Weight(tuple(x.shape), x.dtype) for name, x in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()
