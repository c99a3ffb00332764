"""The weights in a checkpoint, read one matrix at a time, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.engine.checkpoint_index import Chunk, data_offset, read_index
from megatron_moe.engine.weights import Weight, holds_weights, names_in


class CheckpointWeights:
    """The weights of a folder that Megatron-Core's dist_checkpointing wrote, or `engine.weight_writer`.

    Only the bytes of what is asked for are read. Raises InputError where the folder holds no checkpoint, and
    on reading where its files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tensors, self._chunks = read_index(folder)
        self._inventory: dict[str, Weight] = {}
        self._where: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._offsets: dict[Chunk, int] = {}
        for key, tensor in tensors.items():
            if holds_weights(key):
                for place, name in names_in(key, tensor.size):
                    self._where[name] = key, place
                    shape = tuple(tensor.size[len(place) :])
                    self._inventory[name] = Weight(shape, tensor.properties.dtype)
        if not self._inventory:
            raise InputError(f"{folder}: this checkpoint holds no weights")

    def __reduce__(self) -> tuple[type[CheckpointWeights], tuple[Path]]:
        """Processes that share the work open the folder anew."""
        return type(self), (self._folder,)

    def inventory(self) -> Mapping[str, Weight]:
        return self._inventory

    def read(self, name: str) -> Tensor:
        key, place = self._where[name]
        weight = self._inventory[name]
        result: Tensor | None = None
        filled = 0
        for chunk in self._chunks[key]:
            inside = [
                number - begin
                for number, begin, size in zip(place, chunk.start, chunk.sizes, strict=False)
                if begin <= number < begin + size
            ]
            if len(inside) == len(place):
                block = self._read_block(chunk, inside, weight.dtype)
                if block.shape == weight.shape:
                    return block
                if result is None:
                    result = torch.empty(weight.shape, dtype=weight.dtype)
                begins = chunk.start[len(place) :]
                where = tuple(slice(at, at + size) for at, size in zip(begins, block.shape, strict=True))
                result[where] = block
                filled += block.numel()
        wanted = torch.Size(weight.shape).numel()
        if result is None or filled != wanted:
            raise InputError(f"{self._folder}: has only {filled:,} of {wanted:,} numbers of {name}")
        return result

    def _read_block(self, chunk: Chunk, inside: list[int], dtype: torch.dtype) -> Tensor:
        """What the chunk has of the matrix at `inside` in its leading dimensions."""
        leading, sizes = chunk.sizes[: len(inside)], chunk.sizes[len(inside) :]
        block = torch.empty(sizes, dtype=dtype)
        number = 0
        for size, index in zip(leading, inside, strict=True):
            number = number * size + index
        try:
            with chunk.path.open("rb") as file:
                if chunk not in self._offsets:
                    self._offsets[chunk] = data_offset(file, chunk, dtype)
                file.seek(self._offsets[chunk] + number * block.nbytes)
                buffer = memoryview(block.reshape(-1).view(torch.uint8).numpy())
                if file.readinto(buffer) != block.nbytes:
                    raise InputError(f"{chunk.path}: ends before its tensors do")
        except OSError as error:
            raise InputError(f"{chunk.path}: {error.strerror}") from None
        return block
