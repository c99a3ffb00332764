"""The list of tensors at the beginning of a safetensors file: eight bytes with its length, and JSON.

Read here, and not by the library, so that each fault of a file is said in words, and because the library
cannot write a file piece by piece.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.errors import InputError
from megatron_moe.convert.weights import Weight

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST = 100_000_000
"""Bytes of a list, as the library allows them."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, `weight.bytes` from byte `offset` on."""

    path: Path
    offset: int
    weight: Weight


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises InputError where the file is missing, cut short, or none."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path}: is no file")
        with path.open("rb") as file:
            length_bytes = file.read(8)
            if (length_bytes + file.read(len(_LFS_POINTER))).startswith(_LFS_POINTER):
                raise InputError(
                    f"{path}: is only a pointer of Git LFS ({size} bytes); get the file itself with `git lfs "
                    "pull` in the folder that was cloned"
                )
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) == 8 and length <= _LONGEST and size < 8 + length:
                raise InputError(_cut_short(path, size, 8 + length))
            file.seek(8)
            header = json.loads(file.read(length)) if 2 <= length <= _LONGEST else None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path}: is no safetensors file ({size:,} bytes)")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, 8 + length, name, entry) for name, entry in header.items()}
    end = max((stored.offset + stored.weight.bytes for stored in tensors.values()), default=8 + length)
    if end > size:
        raise InputError(_cut_short(path, size, end))
    return tensors


def _cut_short(path: Path, size: int, wanted: int) -> str:
    return f"{path}: has {size:,} of at least {wanted:,} bytes: its download was not finished; get it again"


def _stored(path: Path, data: int, name: str, entry: Any) -> Stored:
    try:
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        is_described = all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        is_described = False
    if not is_described:
        raise InputError(f"{path}: is no safetensors file: {name} is not described")
    if dtype is None:
        raise InputError(f"{path}: {name} has dtype {entry['dtype']}, which is not known here")
    weight = Weight(shape, dtype)
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path}: is no safetensors file: {name} has other bytes than its shape and dtype")
    return Stored(path, data + begin, weight)


def header_bytes(tensors: Mapping[str, Weight]) -> bytes:
    """What a file begins with that holds these tensors one behind the other, in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, weight in tensors.items():
        entries[name] = {
            "dtype": _NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [at, at + weight.bytes],
        }
        at += weight.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin where processors like them to
    return len(text).to_bytes(8, "little") + text
