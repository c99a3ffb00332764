"""Token files in Megatron's format: `<prefix>.bin` holds the ids one after the other, `<prefix>.idx` where
sequences begin.

Written and read here without torch, byte for byte as Megatron-Core's `IndexedDatasetBuilder` does (a test
compares them).
The .idx: magic, version 1 (u64), dtype code (u8), sequences n (u64), documents + 1 (u64), n lengths (i32), n
byte offsets (i64), the index of each document's first sequence and the end (i64). We make one sequence a
document.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LONGEST = np.iinfo(np.int32).max


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """The type that ids are stored in: Megatron-Core's `DType.optimal_dtype`."""
    return np.uint16 if vocab_size < 65500 else np.int32


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


class TokenWriter:
    """Writes `<prefix>.bin` as tokens arrive, and `<prefix>.idx` on `finish`."""

    def __init__(self, prefix: Path, dtype: type[np.integer[Any]]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._bin = bin_path(prefix).open("wb")
        self._lengths: list[NDArray[np.int64]] = []
        self._open_length = 0

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int64], ends_document: bool) -> None:
        """Append the tokens of documents of these lengths. `ends_document` False: the last one goes on in the
        next call.

        InputError for a document that is longer than the format can say.
        """
        self._bin.write(tokens.astype(self._dtype, copy=False).tobytes())
        if not lengths.size:
            return
        lengths = lengths.copy()
        lengths[0] += self._open_length
        self._open_length = 0 if ends_document else int(lengths[-1])
        if lengths.max() > _LONGEST:
            raise InputError(
                f"documents: one has more than {_LONGEST:,} tokens, the most that token files can hold; "
                "cut the text smaller, for example with documents: paragraph"
            )
        self._lengths.append(lengths if ends_document else lengths[:-1])

    def finish(self) -> tuple[int, int]:
        """Write the index and bring both files to the disk. Returns the number of documents and of tokens."""
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        pointers = (np.cumsum(lengths) - lengths) * np.dtype(self._dtype).itemsize
        with idx_path(self._prefix).open("wb") as idx:
            idx.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self._dtype], lengths.size, lengths.size + 1))
            idx.write(lengths.astype(np.int32).tobytes())
            idx.write(pointers.astype(np.int64).tobytes())
            idx.write(np.arange(lengths.size + 1, dtype=np.int64).tobytes())
            _to_disk(idx)
        _to_disk(self._bin)
        self.close()
        return int(lengths.size), int(lengths.sum())

    def close(self) -> None:
        self._bin.close()


@dataclass(frozen=True)
class TokenFiles:
    """The index of a pair of token files that was found in order."""

    prefix: Path
    dtype: type[np.integer[Any]]
    documents: int
    sequences: int
    tokens: int

    def read(self) -> NDArray[Any]:
        """All token ids [tokens], mapped and not read."""
        return np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r", shape=(self.tokens,))

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sequence, mapped and not read."""
        return np.memmap(idx_path(self.prefix), np.int32, "r", offset=_HEADER.size, shape=(self.sequences,))


def open_token_files(prefix: Path) -> TokenFiles:
    """Check that both files are there, whole, and fit each other.

    InputError, naming the file, for a missing, foreign or truncated one.
    """
    if prefix.suffix in (".bin", ".idx"):
        raise InputError(f"{prefix}: token files are named without {prefix.suffix}: {prefix.with_suffix('')}")
    sizes = {}
    for path in (bin_path(prefix), idx_path(prefix)):
        try:
            sizes[path.suffix] = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot read the token file: {error.strerror}") from None
    return _checked_index(prefix, bin_bytes=sizes[".bin"], idx_bytes=sizes[".idx"])


def _checked_index(prefix: Path, bin_bytes: int, idx_bytes: int) -> TokenFiles:
    path = idx_path(prefix)
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise InputError(
            f"{path}: not the index of token files in Megatron's format, or cut short ({idx_bytes:,} bytes)"
        )
    _, version, code, sequences, document_ends = _HEADER.unpack(header)
    if version != _VERSION or code not in _DTYPES:
        raise InputError(f"{path}: version {version} with token type {code} is unknown; make the files anew")
    expected = _HEADER.size + 12 * sequences + 8 * document_ends
    # Files with a mode a sequence (multimodal ones) are longer by one byte each.
    if idx_bytes not in (expected, expected + sequences):
        raise InputError(
            f"{path}: has {idx_bytes:,} bytes where its header says {expected:,}; it was cut short or damaged"
        )
    if not sequences or not document_ends:
        raise InputError(f"{path}: holds no documents")
    index = np.memmap(path, mode="r")
    lengths = np.frombuffer(index, np.int32, sequences, _HEADER.size)
    pointers = np.frombuffer(index, np.int64, sequences, _HEADER.size + 4 * sequences)
    ends = np.frombuffer(index, np.int64, document_ends, _HEADER.size + 12 * sequences)
    dtype = _DTYPES[code]
    itemsize = np.dtype(dtype).itemsize
    stops = np.cumsum(lengths, dtype=np.int64) * itemsize
    follows = pointers[0] == 0 and np.array_equal(pointers[1:], stops[:-1])
    counts = ends[0] == 0 and ends[-1] == sequences and not np.any(np.diff(ends) < 0)
    if lengths.min() < 0 or not follows or not counts:
        raise InputError(f"{path}: contradicts itself, so it is damaged; make the files anew")
    if bin_bytes != stops[-1]:
        raise InputError(
            f"{bin_path(prefix)}: has {bin_bytes:,} bytes where its index says {int(stops[-1]):,}; "
            "it was cut short, or belongs to another index"
        )
    if not bin_bytes:
        raise InputError(f"{bin_path(prefix)}: holds no tokens")
    return TokenFiles(prefix, dtype, int(document_ends) - 1, int(sequences), int(stops[-1]) // itemsize)


def _to_disk(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
