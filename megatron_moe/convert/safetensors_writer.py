"""Writes the files of a Hugging Face folder, each tensor straight to its place: nothing but one group of
tensors is ever held, and several processes fill the files at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.convert.safetensors_files import INDEX, SINGLE
from megatron_moe.convert.safetensors_header import header_bytes
from megatron_moe.convert.weights import Weight
from megatron_moe.engine.worker_pool import worker_pool


class TensorGroups(Protocol):
    """Tensors that are computed some at a time."""

    def groups(self) -> Sequence[Mapping[str, Weight]]:
        """What each step makes, in the order of the files."""

    def make(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one step."""


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int


def write_safetensors(folder: Path, tensors: TensorGroups, shard_bytes: int, workers: int) -> None:
    """Write all tensors into `folder`, and their index where one file of at most `shard_bytes` does not hold
    them. A larger tensor has a file of its own. Raises OSError where the disk refuses."""
    groups = tensors.groups()
    shards = _shards([item for group in groups for item in group.items()], shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    places: dict[str, _Place] = {}
    for file, shard in zip(names, shards, strict=True):
        places |= _begin_file(folder, file, shard)
    if len(shards) > 1:
        total = sum(weight.bytes for shard in shards for weight in shard.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: places[name].file for name in sorted(places)},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    parts = _parts([sum(weight.bytes for weight in group.values()) for group in groups], workers)
    if len(parts) == 1:
        _fill(folder, tensors, parts[0], places)
    else:
        with worker_pool(len(parts)) as pool:
            for task in [pool.submit(_fill, folder, tensors, part, places) for part in parts]:
                task.result()
    for name in names:
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())


def _shards(tensors: Sequence[tuple[str, Weight]], shard_bytes: int) -> list[dict[str, Weight]]:
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in tensors:
        if shards[-1] and size + weight.bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.bytes
    return shards


def _begin_file(folder: Path, name: str, tensors: Mapping[str, Weight]) -> dict[str, _Place]:
    """A file with its header and room for its tensors; where each belongs."""
    header = header_bytes(tensors)
    at = len(header)
    places = {}
    for tensor, weight in tensors.items():
        places[tensor] = _Place(name, at)
        at += weight.bytes
    with (folder / name).open("wb") as file:
        file.write(header)
        file.truncate(at)
    return places


def _parts(sizes: Sequence[int], workers: int) -> list[range]:
    """Neighbouring groups for each worker, of about as many bytes."""
    total, so_far = max(1, sum(sizes)), 0
    counts = [0] * workers
    for size in sizes:
        counts[min(workers - 1, so_far * workers // total)] += 1
        so_far += size
    ends = [sum(counts[: n + 1]) for n in range(workers)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True) if count]


def _fill(folder: Path, tensors: TensorGroups, numbers: range, places: Mapping[str, _Place]) -> None:
    for number in numbers:
        for name, tensor in tensors.make(number):
            place = places[name]
            with (folder / place.file).open("r+b", buffering=0) as file:
                file.seek(place.offset)
                content = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                while len(content):
                    content = content[file.write(content) :]
