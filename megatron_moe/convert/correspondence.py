"""How our weights correspond to those of a Hugging Face checkpoint.

Each `Group` is some of ours that hold the same numbers as some of theirs. It can be computed both ways
without loss, so that import and export give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError

Tensors = list[Tensor]


@dataclass(frozen=True)
class Group:
    """The smallest set of weights that can be converted without looking at others.

    Attributes:
        ours: names as in `convert.weights`.
        theirs: names in the safetensors files.
        to_ours: tensors in the order of `theirs` -> in the order of `ours`.
        to_theirs: back.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]


def same(ours: str, theirs: str) -> Group:
    """One weight, which differs by its name only."""
    return Group((ours,), (theirs,), list, list)


def gated(ours: str, gate: str, up: str) -> Group:
    """Gate and up-projection [f, .] each, ours one behind the other: [2 f, .]."""
    return Group(
        (ours,), (gate, up), lambda x: [torch.cat(x)], lambda x: [part.contiguous() for part in x[0].chunk(2)]
    )


def query_key_value(ours: str, theirs: Sequence[str], heads: int, groups: int) -> Group:
    """Projections of queries [n d, .], keys and values [g d, .], ours group by group: the queries of its
    heads, its key, its value. Biases likewise, without the last dimension."""
    queries = heads // groups

    def fuse(parts: Tensors) -> Tensors:
        by_group = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return [torch.cat(by_group, dim=1).flatten(0, 1)]

    def split(fused: Tensors) -> Tensors:
        by_group = fused[0].reshape(groups, -1, *fused[0].shape[1:])
        width = by_group.size(1) // (queries + 2)
        parts = by_group.split([queries * width, width, width], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    return Group((ours,), tuple(theirs), fuse, split)


def padded(ours: str, theirs: str, rows: int, padded_rows: int) -> Group:
    """A matrix with a row a token [v, h], ours with rows of zeros behind it that no token has: [padded v,
    h]."""

    def pad(x: Tensors) -> Tensors:
        filling = x[0].new_zeros(padded_rows - rows, *x[0].shape[1:])
        return [torch.cat([x[0], filling])]

    return Group((ours,), (theirs,), pad, lambda x: [x[0][:rows].contiguous()])


def stacked(ours: Sequence[str], theirs: str) -> Group:
    """Matrices of ours that are one tensor there, [e, ...]."""
    return Group(tuple(ours), (theirs,), lambda x: list(x[0].unbind()), lambda x: [torch.stack(x)])


def with_copies(group: Group, copies: Sequence[str]) -> Group:
    """A group of one of theirs, which lies there under further names too.

    Its `to_ours` raises InputError where one of these holds other numbers: ours has one place for them.
    """
    if not copies:
        return group
    original = group.theirs[0]

    def only_one(x: Tensors) -> Tensors:
        for name, copy in zip(copies, x[1:], strict=True):
            if not copy.is_meta and not torch.equal(copy, x[0]):
                raise InputError(
                    f"{name} is no copy of {original}: it holds other numbers, and is one with it here"
                )
        return group.to_ours(x[:1])

    return Group(group.ours, (original, *copies), only_one, lambda x: group.to_theirs(x) * (1 + len(copies)))
