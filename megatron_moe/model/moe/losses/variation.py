"""How uneven numbers are."""

from __future__ import annotations

from torch import Tensor


def squared_variation(values: Tensor) -> Tensor:
    """The squared coefficient of variation CV^2: population variance over the squared mean; 0 where all are
    0."""
    return values.var(correction=0) / values.mean().square().clamp(min=1e-20)
