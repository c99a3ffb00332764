"""Writes a checkpoint of weights alone, one matrix at a time: it never holds a model.

The files are those of Megatron-Core's dist_checkpointing, which loads them in any layout: each matrix is a
chunk of its tensor, saved by torch, and `.metadata` says where it lies. Several processes write a file each.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe.config.errors import InputError
from megatron_moe.engine.weights import Weights, names_in, stacked_axes
from megatron_moe.engine.worker_pool import worker_pool

_COMMON = "common.pt"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""As Megatron-Core's `metadata.json` says it."""


_LARGE = 1 << 20
"""Bytes from which on a piece that torch writes is the tensor itself, which stays; others are gone soon."""


@dataclass
class _Written:
    """What one process wrote: where each weight lies in its file, and what the whole file hashes to."""

    file: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    sha256: str = ""


def write(
    folder: Path,
    tensors: Mapping[str, Sequence[int]],
    objects: Iterable[str],
    weights: Weights,
    workers: int = 1,
) -> dict[str, str]:
    """Write all weights into `folder`, which must be there and empty.

    Args:
        tensors: shapes by the keys of the checkpoint; the weights must be those that are in there.
        objects: keys of what lies beside tensors, with nothing in it.
        workers: processes that read and write at once; with more than one, `weights` is pickled to each.

    Returns:
        SHA-256 of each file, by name. Raises OSError where the disk refuses.
    """
    inventory = weights.inventory()
    chunks = {
        name: (*(1 for _ in place), *shape[len(place) :])
        for key, shape in tensors.items()
        for place, name in names_in(key, shape)
    }
    shares = _shares({name: weight.bytes for name, weight in inventory.items()}, workers)
    shaped = [{name: chunks[name] for name in share} for share in shares]
    if len(shares) == 1:
        written = [_write_share(folder, 0, shaped[0], weights)]
    else:
        with worker_pool(len(shares)) as pool:
            tasks = [
                pool.submit(_write_share, folder, number, share, weights)
                for number, share in enumerate(shaped)
            ]
            written = [task.result() for task in tasks]
    hashes = {share.file: share.sha256 for share in written}
    beside = _write_objects(folder, objects)
    hashes[beside.file] = beside.sha256
    files = {
        ".metadata": pickle.dumps(_metadata(tensors, weights, written, beside)),
        "metadata.json": json.dumps(_FORMAT).encode(),
        _COMMON: _saved({}),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes


def _shares(sizes: Mapping[str, int], workers: int) -> list[list[str]]:
    """The names in their order, cut into parts of about as many bytes each."""
    total, so_far = max(1, sum(sizes.values())), 0
    shares: list[list[str]] = [[] for _ in range(workers)]
    for name, size in sizes.items():
        shares[min(workers - 1, so_far * workers // total)].append(name)
        so_far += size
    return [share for share in shares if share]


def _write_share(
    folder: Path, number: int, chunks: Mapping[str, tuple[int, ...]], weights: Weights
) -> _Written:
    """`chunks`: the shape of each weight as a block of its stacked tensor."""
    written = _Written(f"__{number}_0.distcp")
    with (folder / written.file).open("wb") as raw, _Hashed(raw) as file:
        for name, shape in chunks.items():
            begin = file.tell()
            tensor = weights.read(name).reshape(shape).contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                # A part of a larger tensor would be saved with all of it.
                tensor = tensor.clone()
            file.save(tensor)
            written.places[name] = begin, file.tell() - begin
        written.sha256 = file.sha256()
    return written


def _write_objects(folder: Path, objects: Iterable[str]) -> _Written:
    written = _Written("__objects.distcp")
    with (folder / written.file).open("wb") as raw, _Hashed(raw) as file:
        for key in objects:
            begin = file.tell()
            file.write(_saved([None]))
            written.places[key] = begin, file.tell() - begin
        written.sha256 = file.sha256()
    return written


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is written, by a thread of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._at, self._hash = file, 0, hashlib.sha256()
        self._error: OSError | None = None
        self._thread = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, content: Any) -> int:
        self._wait()
        if len(content) < _LARGE:
            self._hash.update(content)
        else:
            self._hashing = self._thread.submit(self._hash.update, content)
        try:
            size = self._file.write(content)
        except OSError as error:
            self._error = error
            raise
        self._at += size
        return size

    def save(self, tensor: torch.Tensor) -> None:
        """As torch saves it. Raises OSError where the disk refuses, which torch reports as something
        else."""
        try:
            torch.save(tensor, cast("IO[bytes]", self))
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise
        # Its numbers must stay until they are hashed.
        self._wait()

    def sha256(self) -> str:
        self._wait()
        return self._hash.hexdigest()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


def _metadata(
    tensors: Mapping[str, Sequence[int]], weights: Weights, written: Sequence[_Written], beside: _Written
) -> Metadata:
    inventory = weights.inventory()
    described: dict[str, Any] = {key: BytesStorageMetadata() for key in beside.places}
    stored = {
        MetadataIndex(key): _StorageInfo(beside.file, offset, length)
        for key, (offset, length) in beside.places.items()
    }
    where = {name: (share.file, *place) for share in written for name, place in share.places.items()}
    for key, shape in tensors.items():
        axes = stacked_axes(key)
        matrix = tuple(shape[axes:])
        chunks = []
        for index, (place, name) in enumerate(names_in(key, shape)):
            start = torch.Size((*place, *(0 for _ in matrix)))
            chunks.append(ChunkStorageMetadata(start, torch.Size((*(1 for _ in place), *matrix))))
            file, offset, length = where[name]
            stored[MetadataIndex(key, start, index)] = _StorageInfo(file, offset, length)
        dtypes = {inventory[name].dtype for _, name in names_in(key, shape)}
        if len(dtypes) > 1:
            mixed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise InputError(f"{key}: is {mixed}, and a checkpoint has one precision for it: say --dtype")
        properties = TensorProperties(dtype=dtypes.pop())
        described[key] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    return Metadata(state_dict_metadata=described, storage_data=stored)
