"""Parts of an all-to-all, of which one travels while another is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_moe.model.moe.dispatch.dispatcher import Experts
from megatron_moe.model.moe.permutation import Permutation


@runtime_checkable
class SplitExperts(Protocol):
    """Experts of which some can be computed without the others."""

    def split(self, sizes: list[int]) -> list[Experts]:
        """So many of this rank's experts each, in their order."""
        ...


@dataclass(frozen=True)
class Part:
    """Some of each rank's experts, or a share of the rows of one.

    Attributes:
        first, stop: the local experts from `first` to before `stop`.
        share, shares: of the n rows that a rank sends to an expert those with numbers from
            ceil(share * n / shares) to before ceil((share + 1) * n / shares).
    """

    first: int
    stop: int
    share: int = 0
    shares: int = 1

    def of(self, counts: Tensor) -> Tensor:
        """Rows a local expert [.., local experts] -> those in this part [.., stop - first]."""
        counts = counts[..., self.first : self.stop]
        if self.shares == 1:
            return counts
        return self._before(counts, self.share + 1) - self._before(counts, self.share)

    def _before(self, counts: Tensor, share: int) -> Tensor:
        return (counts * share + self.shares - 1) // self.shares


def split(local_experts: int, degree: int) -> list[Part]:
    """`degree` parts of nearly the same size.

    Up to one part an expert they are whole experts: then each matrix product stays what it is, and with it
    every bit of the result. More parts cut the rows of experts, so that gradients of weights are added up in
    another order.
    """
    if degree <= local_experts:
        bounds = [local_experts * index // degree for index in range(degree + 1)]
        return [Part(first, stop) for first, stop in pairwise(bounds)]
    parts = []
    for expert in range(local_experts):
        shares = degree // local_experts + (expert < degree % local_experts)
        parts += [Part(expert, expert + 1, share, shares) for share in range(shares)]
    return parts


def experts_of(parts: Sequence[Part], experts: Experts) -> list[Experts]:
    """What computes each part."""
    if len(parts) == 1:
        return [experts]
    assert isinstance(experts, SplitExperts)
    begins = [part for part in parts if part.share == 0]
    pieces = experts.split([part.stop - part.first for part in begins])
    return [piece for part, piece in zip(begins, pieces, strict=True) for _ in range(part.shares)]


@torch.no_grad()
def by_parts(permutation: Permutation, experts: Tensor, parts: Sequence[Part]) -> Permutation:
    """The same assignments, those of the first part first, inside a part by expert as before.

    Args:
        permutation: by expert, numbered over all ranks.
        experts: [t, k] that it sorts.
    """
    if len(parts) == 1:
        return permutation
    number, assignments = len(permutation.sources), permutation.assignments
    expert = experts.reshape(-1).index_select(0, assignments)
    first, shares = _of_local_experts(parts, experts.device)
    local = expert % len(first)
    begins = permutation.counts.cumsum(0) - permutation.counts
    place = torch.arange(number, device=expert.device) - begins[expert]
    part = first[local] + place * shares[local] // permutation.counts[expert]
    order = (part * len(permutation.counts) + expert).argsort(stable=True)
    rows = torch.full((experts.numel(),), number, device=expert.device)
    rows[assignments[order]] = torch.arange(number, device=expert.device)
    return replace(
        permutation,
        sources=permutation.sources[order],
        assignments=assignments[order],
        rows=rows.view_as(experts),
    )


def _of_local_experts(parts: Sequence[Part], device: torch.device) -> tuple[Tensor, Tensor]:
    """[local experts] the first part that each has rows in, and the parts that its rows are cut in."""
    first: dict[int, int] = {}
    shares: dict[int, int] = {}
    for number, part in enumerate(parts):
        for expert in range(part.first, part.stop):
            first.setdefault(expert, number)
            shares[expert] = part.shares
    return (
        torch.tensor(list(first.values()), device=device),
        torch.tensor(list(shares.values()), device=device),
    )
