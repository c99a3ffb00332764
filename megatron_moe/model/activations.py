"""The activations of feed-forward layers, by their names in the YAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """What stands between the two matrices of a feed-forward layer.

    Attributes:
        function: of the first half of the inner channels, the gate, or without gate of all.
        is_gated: its values are multiplied by the second half, the up-projection.
        limit: the gate is at most this, the up-projection between minus this and this; None: no limit.
        offset: added to the up-projection.
    """

    function: Callable[[Tensor], Tensor]
    is_gated: bool
    limit: float | None = None
    offset: float = 0.0

    def apply(self, inner: Tensor) -> Tensor:
        """[.., g f] -> [.., f], g = 2 where it is gated, else 1."""
        if not self.is_gated:
            return self.function(inner)
        gate, up = inner.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.function(gate) * (up + self.offset if self.offset else up)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer)."""
    return torch.square(F.relu(x))


QUICK_GELU = 1.702
"""Of x sigmoid(1.702 x), nearly the GELU (Hendrycks and Gimpel 2016, section 2)."""


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(QUICK_GELU * x)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(F.silu, True),
    "geglu": Activation(F.gelu, True),
    "clamped_swiglu": Activation(quick_gelu, True, limit=7.0, offset=1.0),
    "gelu": Activation(F.gelu, False),
    "relu": Activation(F.relu, False),
    "squared_relu": Activation(squared_relu, False),
}
