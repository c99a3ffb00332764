"""Weights into a model that stands already, in whatever layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.config.freezing import is_adapter
from megatron_moe.convert.completeness import faults
from megatron_moe.convert.weights import Weights
from megatron_moe.engine.checkpoint import sharded_weights, unwrap
from megatron_moe.engine.weights import holds_weights, names_in, stacked_axes


@torch.no_grad()
def fill(chunks: list[torch.nn.Module], weights: Weights) -> None:
    """Give this rank's model chunks their parts of the weights, cast to their precision. A collective.

    States of balancing losses stay as they are, and adapters, which no model brings. An optimizer that keeps
    weights of its own must take them over afterwards (`reload_model_params`).

    Raises InputError, on all ranks, naming every weight that any of them lacks, that no rank has, or that has
    another shape.
    """
    everything = (piece for tensor in sharded_weights(chunks) for piece in _pieces(tensor))
    pieces = [piece for piece in everything if not is_adapter(piece.name)]
    _check(pieces, weights)
    # A wrapper for training has other buffers under that name.
    models = [unwrap(chunk) for chunk in chunks]
    inside = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    inside |= {buffer.untyped_storage().data_ptr() for model in models for buffer in model.buffers()}
    by_name: dict[str, list[_Piece]] = {}
    for piece in pieces:
        assert piece.data.untyped_storage().data_ptr() in inside, f"{piece.name} is a copy"
        by_name.setdefault(piece.name, []).append(piece)
    for name in weights.inventory():
        if name in by_name:
            whole = weights.read(name)
            for piece in by_name[name]:
                piece.data.copy_(whole[piece.where])


class _Piece:
    """A block of a weight that this rank holds, without the dimensions that only count layers and experts."""

    def __init__(self, name: str, shape: tuple[int, ...], where: tuple[slice, ...], data: Tensor) -> None:
        self.name, self.shape, self.where, self.data = name, shape, where, data


def _pieces(tensor: Any) -> Iterator[_Piece]:
    """The matrices of a ShardedTensor of Megatron-Core."""
    if not holds_weights(tensor.key):
        return
    axes = stacked_axes(tensor.key)
    data = tensor.data.detach()
    data = data.view((1,) * tensor.prepend_axis_num + tuple(data.shape))
    begin, shape = tensor.global_offset, tuple(tensor.global_shape[axes:])
    where = tuple(slice(at, at + size) for at, size in zip(begin[axes:], data.shape[axes:], strict=True))
    for place, name in names_in(tensor.key, data.shape, begin):
        local = tuple(number - at for number, at in zip(place, begin, strict=False))
        yield _Piece(name, shape, where, data[local])


def _check(pieces: list[_Piece], weights: Weights) -> None:
    mine = {piece.name: piece.shape for piece in pieces}
    everyone: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    expected = {name: shape for theirs in everyone for name, shape in theirs.items()}
    if problems := list(faults(expected, weights)):
        raise InputError(*problems)
