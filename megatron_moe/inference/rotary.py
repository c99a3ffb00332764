"""Rotary positions of single tokens, each at a place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Angles:
    """Of some tokens.

    Attributes:
        cos: [t, 1, 1, r] for the r channels of a head that are rotated.
        sin: likewise, the sign that the rotation takes in it.
    """

    cos: Tensor
    sin: Tensor


class Rotary:
    """Tables of all positions, and the rotation itself.

    Args:
        module: Megatron-Core's rotary embedding, or one that is called like it: length -> angles [length, 1,
            1, r], or these and a factor.
        length: positions to make tables for.
        dtype: of what is rotated.
        interleaved: neighbouring channels are pairs, else those half of r apart.
        gathers: channels come as pairs of neighbours and leave with the first of each pair in front, as in
            multi-latent attention.
    """

    def __init__(
        self, module: Any, length: int, dtype: torch.dtype, interleaved: bool, gathers: bool = False
    ) -> None:
        given = module(length)
        angles, factor = given if isinstance(given, tuple) else (given, 1.0)
        self.interleaved, self.gathers, self.width = interleaved, gathers, angles.size(-1)
        sign = torch.ones(self.width, device=angles.device)
        if interleaved:
            sign[::2] = -1
        else:
            sign[: self.width // 2] = -1
        self.cos = (angles.cos() * factor).to(dtype)
        self.sin = (angles.sin() * factor * sign).to(dtype)

    def at(self, positions: Tensor) -> Angles:
        """[t] -> the angles of these positions."""
        return Angles(self.cos.index_select(0, positions), self.sin.index_select(0, positions))

    def __call__(self, x: Tensor, angles: Angles) -> Tensor:
        """[t, 1, n, d] -> the same with its first r channels rotated."""
        if self.width == x.size(-1):
            return self._rotated(x, angles)
        rotated, rest = x.split([self.width, x.size(-1) - self.width], dim=-1)
        return torch.cat([self._rotated(rotated, angles), rest], dim=-1)

    def _rotated(self, x: Tensor, angles: Angles) -> Tensor:
        if self.gathers:
            x = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
        if self.interleaved:
            swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped = x.roll(self.width // 2, dims=-1)
        return torch.addcmul(x * angles.cos, swapped, angles.sin)
