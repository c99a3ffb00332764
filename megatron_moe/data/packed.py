"""Files as they lie on the disk, plain or packed, read once from front to back: counted, hashed, unpacked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from megatron_moe.config.errors import InputError

READ_BYTES = 1 << 20
_PACKED_BYTES = 1 << 16
"""At once: what they stand for may be a thousand times larger."""
_LARGEST_WINDOW = 1 << 31
"""Bytes. What `zstd --long=31`, the largest setting, needs to unpack."""


def check_regular(path: str) -> None:
    """InputError for a pipe or a device, which nobody can read twice. OSError if it is not there."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a pipe or a device; give a file, which can be read twice")


class HashingFile(io.RawIOBase):
    """The bytes of a file; counts and hashes what was read. OSError if it cannot be opened."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self.hash = hashlib.sha256()
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer)
        self.hash.update(memoryview(buffer)[:count])
        self.bytes_read += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def unpacked(stream: io.BufferedReader[Any], path: str) -> io.BufferedIOBase:
    """`stream` itself, or what is packed in it, by the name of the file. InputError if zstandard is
    missing."""
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=stream)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(stream, optional("zstandard", "zstd", path)), READ_BYTES)
    return stream


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turn what reading a damaged or unreadable file raises into an InputError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a gzip file, or a damaged one: {error}") from None
    except _DamagedZstd as error:
        raise InputError(f"{path}: not a zstd file, or a damaged one: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the input: {error.strerror}") from None


def optional(module: str, extra: str, what: str) -> Any:
    """A package that only some inputs need. InputError that says how to install it if it is missing."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(
            f"{what}: reading it needs {module.partition('.')[0]}, which is not installed; "
            f"pip install 'megatron-moe[{extra}]'"
        ) from None


class _DamagedZstd(Exception):
    pass


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file, one after the other.

    zstandard's own reader takes a file that was cut short for one that ends there.
    """

    def __init__(self, stream: io.BufferedReader[Any], zstandard: Any) -> None:
        self._stream = stream
        self._zstandard = zstandard
        self._context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._packed = self._packed or self._stream.read1(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise _DamagedZstd("it ends inside a frame")
                return 0
            self._text = memoryview(self._unpack())
        count = min(len(self._text), len(buffer))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def _unpack(self) -> bytes:
        if self._frame is None:
            self._frame = self._context.decompressobj()
        try:
            text: bytes = self._frame.decompress(self._packed)
        except self._zstandard.ZstdError as error:
            raise _DamagedZstd(str(error).removeprefix("zstd decompressor error: ")) from None
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None
        return text
