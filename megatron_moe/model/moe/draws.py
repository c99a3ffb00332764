"""Random numbers that depend on nothing but who draws them and where: no state, no order, no layout.

A number is a hash of (seed, layer, purpose) and of the token's position among all tokens of the run. So each
iteration draws new ones, recompute and every rank the same, and padding moves none.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_moe.model.moe.microbatch import Microbatch

_BITS = 23
"""Of a number: (n + 1/2) / 2^23 is exact in float32, and neither 0 nor 1."""


class Draws:
    """What one layer draws for the tokens of this rank.

    Args:
        microbatch: whose tokens these are. Where their marks hold no positions (a layer in a program of one's
            own), the whole microbatch gets some from torch's random state, which recompute restores.
        seed: of the run.
        layer_number: from 1.
    """

    def __init__(self, microbatch: Microbatch, seed: int, layer_number: int) -> None:
        self.microbatch, self.seed, self.layer_number = microbatch, seed, layer_number

    def uniform(self, purpose: str, columns: int) -> Tensor:
        """[t, columns] float32, evenly distributed between 0 and 1; others for each purpose."""
        return uniform(self._key(purpose), self._positions, columns)

    def normal(self, purpose: str, columns: int) -> Tensor:
        """[t, columns] float32, normally distributed with mean 0 and variance 1."""
        return normal(self._key(purpose), self._positions, columns)

    def permutation(self, purpose: str, size: int) -> Tensor:
        """[size] the numbers below it in an order of this layer, the same for all tokens and iterations."""
        row = torch.zeros(1, dtype=torch.int64, device=self._positions.device)
        return uniform(self._key(purpose), row, size)[0].argsort()

    def _key(self, purpose: str) -> int:
        return key(self.seed, self.layer_number, purpose)

    @cached_property
    def _positions(self) -> Tensor:
        if self.microbatch.positions is not None:
            return self.microbatch.positions
        first = int(torch.randint(1 << 40, ()))
        return self.microbatch.places + first


def key(*parts: int | str) -> int:
    """What tells those apart who draw: 64 bits, as a signed number."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(drawer: int, rows: Tensor, columns: int, first: int = 0) -> Tensor:
    """[len(rows), columns] float32 between 0 and 1, a function of `drawer`, each row's number and the
    column, of which they begin with the `first`."""
    # One hash makes two numbers.
    begin, skipped = divmod(first, 2)
    count = -(-(skipped + columns) // 2)
    hashes = _hashes(drawer, rows, count, begin).view(torch.int32)[:, skipped : skipped + columns]
    return (((hashes >> (32 - _BITS)) & ((1 << _BITS) - 1)).float() + 0.5) * 2.0**-_BITS


def normal(drawer: int, rows: Tensor, columns: int) -> Tensor:
    """As `uniform`, normally distributed (Box and Muller)."""
    radius, angle = uniform(drawer, rows, 2 * columns).unflatten(1, (columns, 2)).unbind(-1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def _hashes(drawer: int, rows: Tensor, columns: int, begin: int = 0) -> Tensor:
    """[len(rows), columns] int64: SplitMix64 (Steele, Lea, Flood 2014), one stream a row."""
    streams = _mixed(_mixed(rows.long() ^ drawer))
    steps = torch.arange(begin + 1, begin + columns + 1, device=rows.device) * _GAMMA
    return _mixed(streams[:, None] + steps)


def _mixed(z: Tensor) -> Tensor:
    """Each of the 64 bits depends on all of them. Products wrap around; shifts bring in zeros."""
    z = z.bitwise_xor_(_shifted(z, 30)).mul_(_FACTOR_1)
    z = z.bitwise_xor_(_shifted(z, 27)).mul_(_FACTOR_2)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
