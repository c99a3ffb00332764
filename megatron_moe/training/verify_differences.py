"""How far what several ranks hold is from what one process holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_moe.engine.pieces import Piece

FLOOR = 1e-4
"""A tensor's difference is taken relative to its own norm, or to this part of the norm of all tensors
together where its own is smaller: rounding alone leaves a tensor with almost no gradient no digit."""


@dataclass(frozen=True)
class Worst:
    """The tensor that differs most.

    Attributes:
        difference: ||x - x_ref|| / max(||x_ref||, FLOOR * norm of all x_ref).
        rank: whose part of it, or copy of it, differs most; None if no part differs.
        remark: what is wrong beyond the numbers, or empty.
    """

    difference: float
    name: str
    rank: int | None
    remark: str = ""


@dataclass
class _Found:
    """Blocks seen of one tensor: where -> (largest squared difference of its copies, rank, elements)."""

    blocks: dict[tuple[tuple[int, int], ...], tuple[float, int, int]] = field(default_factory=dict)

    def add(self, rank: int, piece: Piece, reference: Tensor, left_out: Tensor | None) -> None:
        where = tuple((part.start, part.stop) for part in piece.where)
        apart = piece.data.double() - reference[piece.where].double()
        if left_out is not None:
            apart = apart.masked_fill(left_out[piece.where], 0)
        difference = float(apart.square().sum())
        # NaN compares as smaller than everything.
        difference = math.inf if math.isnan(difference) else difference
        known = self.blocks.get(where, (-1.0, rank, 0))
        self.blocks[where] = max(known, (difference, rank, piece.data.numel()), key=lambda block: block[0])

    @property
    def elements(self) -> int:
        return sum(elements for _, _, elements in self.blocks.values())

    @property
    def norm(self) -> float:
        return math.sqrt(sum(squared for squared, _, _ in self.blocks.values()))

    @property
    def rank(self) -> int | None:
        squared, rank, _ = max(self.blocks.values(), key=lambda block: block[0])
        return rank if squared > 0 else None


def whole(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """The tensors of one process, which has all their pieces; copies, on the host."""
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        if piece.name not in tensors:
            tensors[piece.name] = torch.full(piece.shape, math.nan, dtype=piece.data.dtype)
        tensors[piece.name][piece.where] = piece.data.cpu()
    return tensors


def changes(
    before: Iterable[tuple[int, Piece]], after: Iterable[tuple[int, Piece]]
) -> Iterator[tuple[int, Piece]]:
    """What was added to each piece of `after`; `before` may have further pieces between them."""
    earlier = iter(before)
    for rank, piece in after:
        old_rank, old = next(earlier)
        while (old_rank, old.name, old.start) != (rank, piece.name, piece.start):
            old_rank, old = next(earlier)
        yield rank, replace(piece, data=piece.data.float() - old.data.float())


def rounding(largest: Mapping[str, Tensor], part: float) -> dict[str, Tensor]:
    """Where gradients have been rounding only, no number: above 0, and at most this `part` of their tensor's
    root mean square.

    Biases of keys without rotary positions are such: they shift all scores of a query alike.

    Args:
        largest: the largest absolute gradient that each element has had.
    """
    return {
        name: (tensor > 0) & (tensor <= part * tensor.double().square().mean().sqrt())
        for name, tensor in largest.items()
    }


def worst(
    found: Iterable[tuple[int, Piece]],
    reference: Mapping[str, Tensor],
    left_out: Mapping[str, Tensor] | None = None,
) -> Worst:
    """Hold all pieces of all ranks, every copy included, against one process's tensors. `left_out`: by name,
    where an element is not looked at."""
    left_out = left_out or {}
    seen = {name: _Found() for name in reference}
    for rank, piece in found:
        if piece.name not in reference or piece.shape != reference[piece.name].shape:
            return Worst(math.inf, piece.name, rank, "one process has no such tensor")
        seen[piece.name].add(rank, piece, reference[piece.name], left_out.get(piece.name))
    norms = {name: float(torch.linalg.vector_norm(tensor.double())) for name, tensor in reference.items()}
    floor = FLOOR * math.sqrt(sum(norm**2 for norm in norms.values()))
    result = Worst(-1.0, "", None)
    for name, tensor in reference.items():
        if seen[name].elements != tensor.numel():
            return Worst(math.inf, name, None, "no rank holds all of it")
        difference = seen[name].norm
        if difference > 0:
            # Without any norm, not even a floor, every difference is infinitely large.
            scale = max(norms[name], floor)
            difference = difference / scale if scale else math.inf
        if difference > result.difference:
            result = Worst(difference, name, seen[name].rank)
    return result
