"""What lies where in a checkpoint's files (.distcp), read without running anything that stands in them.

`.metadata` is a pickle of torch's. Checkpoints that are resumed from are verified to be our own; those that
are only read for their weights may come from anybody, so that here nothing but the few classes that belong
there is made of it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_moe.config.errors import InputError

METADATA = ".metadata"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MEM_FORMAT_ENCODING",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "collections": ("OrderedDict", "defaultdict"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")


@dataclass(frozen=True)
class Chunk:
    """A block of a checkpoint's tensor.

    Attributes:
        start: where in the tensor it begins.
        path, offset, length: bytes of a file that torch wrote, with the block in them.
    """

    start: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    offset: int
    length: int


def read_index(folder: Path) -> tuple[Mapping[str, TensorStorageMetadata], Mapping[str, list[Chunk]]]:
    """Shape and dtype of each tensor of a checkpoint, and its chunks, by key. Raises InputError where
    `folder` holds none."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{folder}: cannot read {METADATA}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path}: is not what was written: {error}") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise InputError(f"{path}: is not the list of a checkpoint's tensors")
    tensors = {
        key: value
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    chunks: dict[str, list[Chunk]] = {key: [] for key in tensors}
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, value in tensors.items()
        for chunk in value.chunks
    }
    for index, stored in metadata.storage_data.items():
        if index.fqn in tensors:
            start = tuple(index.offset) if index.offset is not None else ()
            start = start or (0,) * len(tensors[index.fqn].size)
            place = Chunk(
                start,
                sizes[index.fqn, start],
                folder / stored.relative_path,
                stored.offset,
                stored.length,
            )
            chunks[index.fqn].append(place)
    return tensors, chunks


class Block(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + position
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._length - self._at))]
        self._file.seek(self._offset + self._at)
        read = cast("io.BufferedIOBase", self._file).readinto(view)
        self._at += read
        return read


def data_offset(file: IO[bytes], chunk: Chunk, dtype: torch.dtype) -> int:
    """Where in `file` the numbers of a chunk begin, one row behind the other.

    Raises InputError where what is there is another tensor.
    """
    item = Block(file, chunk.offset, chunk.length)
    # On the meta device, so that the numbers are not read.
    described = torch.load(cast("IO[bytes]", item), weights_only=True, map_location="meta")
    size = torch.Size(chunk.sizes).numel() * dtype.itemsize
    with zipfile.ZipFile(cast("IO[bytes]", item)) as archive:
        records = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
        if (
            not isinstance(described, Tensor)
            or tuple(described.shape) != chunk.sizes
            or described.dtype != dtype
            or not described.is_contiguous()
            or described.storage_offset()
            or [record.file_size for record in records] != [size]
            or records[0].compress_type != zipfile.ZIP_STORED
        ):
            raise InputError(f"{chunk.path}: the tensor at byte {chunk.offset} is not what {METADATA} says")
        header = chunk.offset + records[0].header_offset
    file.seek(header + 26)
    lengths = file.read(4)
    return header + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
