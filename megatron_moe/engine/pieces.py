"""What each rank holds of every weight matrix: which part of which matrix, by a name that no layout changes.

Megatron-Core's checkpoint mapping stacks layers, and experts, to one tensor. Here they are apart, each under
a name of its own: `decoder.layers.3.mlp.experts.experts.linear_fc2.weight[expert 5]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.engine.checkpoint import sharded_gradients, sharded_weights


@dataclass(frozen=True)
class Piece:
    """A block of a matrix.

    Attributes:
        shape: of the whole matrix.
        start: where in it the block begins.
        data: the block.
        is_data_parallel_copy: whether a rank of another data-parallel index holds the same.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    data: Tensor
    is_data_parallel_copy: bool

    @property
    def where(self) -> tuple[slice, ...]:
        """The index of the block in the whole matrix."""
        return tuple(
            slice(begin, begin + size) for begin, size in zip(self.start, self.data.shape, strict=True)
        )


def of_weights(chunks: list[torch.nn.Module]) -> Iterator[Piece]:
    """This rank's weights, and what else of numbers its checkpoint would hold."""
    return (piece for tensor in sharded_weights(chunks) for piece in _apart(tensor))


def of_gradients(chunks: list[torch.nn.Module]) -> Iterator[Piece]:
    """This rank's gradients, as `main_grad` of the parameters has them."""
    return (piece for tensor in sharded_gradients(chunks) for piece in _apart(tensor))


def write(folder: Path, pieces: Iterator[Piece], copies: bool) -> None:
    """Write this rank's pieces into `folder`, which is made.

    Args:
        copies: also those that a rank of another data-parallel index writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = [piece for piece in pieces if copies or not piece.is_data_parallel_copy]
    records = [
        {"name": piece.name, "shape": piece.shape, "start": piece.start, "data": piece.data} for piece in kept
    ]
    torch.save(records, folder / f"rank_{dist.get_rank()}.pt")


def read(folder: Path) -> Iterator[tuple[int, Piece]]:
    """(rank, piece) of all pieces in `folder`, those of a rank in the order in which it wrote them."""
    for rank in range(len(list(folder.iterdir()))):
        records = torch.load(folder / f"rank_{rank}.pt", weights_only=True, mmap=True, map_location="cpu")
        for record in records:
            yield rank, Piece(**record, is_data_parallel_copy=False)


def _apart(tensor: Any) -> Iterator[Piece]:
    """The matrices of a ShardedTensor of Megatron-Core."""
    name, offset, shape = tensor.key, tensor.global_offset, tensor.global_shape
    data = tensor.data.detach()
    data = data.reshape((1,) * tensor.prepend_axis_num + tuple(data.shape))
    layers_are_stacked = name.startswith("decoder.layers.") and not name.split(".")[2].isdigit()
    is_expert = ".experts." in name
    axes = int(layers_are_stacked) + int(is_expert)
    replica = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    for index in itertools.product(*(range(size) for size in data.shape[:axes])):
        place = [begin + step for begin, step in zip(offset, index, strict=False)]
        full_name = name
        if layers_are_stacked:
            full_name = name.replace("decoder.layers.", f"decoder.layers.{place[0]}.", 1)
        if is_expert:
            full_name += f"[expert {place[-1]}]"
        yield Piece(full_name, tuple(shape[axes:]), tuple(offset[axes:]), data[index], replica[-1] > 0)
