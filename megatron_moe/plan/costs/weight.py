"""Weights of one kind, as the tables of a model's weights list them."""

from __future__ import annotations

from typing import Literal, NamedTuple

Split = Literal["no", "tensor", "expert"]
"""Over nothing, TP, or EP x ETP."""


class Weights(NamedTuple):
    """Parameters of one kind in one piece, before they are split over ranks."""

    total: int
    active: int
    """Those that one token passes."""
    multiplied: int
    """Those of `active` that are a matrix, which a token multiplies."""
    split: Split
    name: str
    """As the checkpoint calls it, behind the layer's own name: `mlp.linear_fc1.weight`. Those of routed
    experts are `mlp.experts.linear_fc1.weight`, all together."""


GATED = ("swiglu", "geglu", "clamped_swiglu")
"""Activations whose gate multiplies an up-projection."""


def first_width(activation: str, inner_width: int) -> int:
    """Columns of a feed-forward's first matrix: a gated activation has two halves."""
    return 2 * inner_width if activation in GATED else inner_width
