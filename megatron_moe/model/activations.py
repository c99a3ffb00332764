"""The activations of feed-forward layers, by their names in the YAML."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer)."""
    return torch.square(F.relu(x))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
    "squared_relu": (squared_relu, False),
}
"""Name -> (function, whether a second projection gates it)."""
