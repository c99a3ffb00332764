"""Input files of every type as a row of chunks."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Literal, Protocol

from megatron_moe.config.errors import InputError
from megatron_moe.config.text_files import suffix_of, unknown_type
from megatron_moe.data.cutting import Cuts, last_cut
from megatron_moe.data.documents import Chunk, Unit
from megatron_moe.data.packed import READ_BYTES, HashingFile, check_regular, damage_named, unpacked

CHUNK_BYTES = 1 << 18
"""So much that handing it to a worker costs little, and so little that the last ones finish together."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class InputFile(Protocol):
    """One input file, read once from front to back."""

    path: str

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as it lies on disk, that were read so far."""

    @property
    def sha256(self) -> str:
        """Of the file as it lies on disk. Only to be asked once all chunks were taken."""

    def chunks(self, unit: Unit, cuts: Cuts) -> Iterator[Chunk]:
        """The file in order. `cuts`: where a document that is a whole file may be cut into several chunks.

        InputError where the file cannot be read or unpacked.
        """

    def close(self) -> None: ...


def open_input(path: str, json_key: str) -> InputFile:
    """Open a file. `json_key`: the column of a parquet file that holds the text.

    InputError if its name says no known type, or it is missing, unreadable, empty or not what its name says,
    as far as that shows at its beginning or end.
    """
    suffix = suffix_of(path)
    if not suffix:
        raise InputError(unknown_type(path))
    with damage_named(path):
        check_regular(path)
    if suffix == ".parquet":
        from megatron_moe.data.parquet import ParquetFile

        return ParquetFile(path, json_key, CHUNK_BYTES)
    return LineFile(path, is_jsonl=suffix.startswith(".jsonl"))


def file_sha256(path: str) -> str:
    """The SHA-256 of a file's bytes. InputError if it cannot be read."""
    with damage_named(path):
        check_regular(path)
    with damage_named(path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class LineFile:
    """Text or jsonl, plain or packed."""

    def __init__(self, path: str, is_jsonl: bool) -> None:
        self.path = path
        self._is_jsonl = is_jsonl
        with damage_named(path), contextlib.ExitStack() as opened:
            self._raw = HashingFile(path)
            reader = io.BufferedReader(self._raw, READ_BYTES)
            opened.callback(reader.close)
            if not reader.peek(1):
                raise InputError(_empty(path))
            self._stream = unpacked(reader, path)
            opened.pop_all()
        self._reader = reader

    @property
    def bytes_read(self) -> int:
        return self._raw.bytes_read

    @property
    def sha256(self) -> str:
        return self._raw.hash.hexdigest()

    def close(self) -> None:
        self._reader.close()

    def chunks(self, unit: Unit, cuts: Cuts) -> Iterator[Chunk]:
        kind: Unit | Literal["record"] = "record" if self._is_jsonl else unit
        blocks = _parts_of_file(self._stream, cuts) if kind == "file" else _blocks(self._stream, kind)
        line = 1
        is_empty = True
        with damage_named(self.path):
            for block, following in pairwise(chain(blocks, [b""])):
                payload = block.removeprefix(_BYTE_ORDER_MARK) if is_empty else block
                ends_document = kind != "file" or not following
                is_empty = is_empty and not payload
                yield Chunk(self.path, line, payload, kind, ends_document)
                line += block.count(b"\n")
        if is_empty:
            raise InputError(_empty(self.path))


def _empty(path: str) -> str:
    return f"{path}: the file is empty; give one that holds text"


def _blocks(stream: io.BufferedIOBase, kind: str) -> Iterator[bytes]:
    """The stream in blocks of about CHUNK_BYTES that end where a line, or a paragraph, ends."""
    while block := stream.read(CHUNK_BYTES):
        lines = [block, stream.readline()]
        if kind == "paragraph":
            lines += _through_blank_line(stream)
        yield b"".join(lines)


def _through_blank_line(stream: io.BufferedIOBase) -> Iterator[bytes]:
    while line := stream.readline():
        yield line
        if not line.strip():
            return


def _parts_of_file(stream: io.BufferedIOBase, cuts: Cuts) -> Iterator[bytes]:
    """The stream in blocks of about CHUNK_BYTES that end where the text may be cut; else in one."""
    if cuts == "nowhere":
        yield stream.read()
        return
    held: list[bytes] = []
    while block := stream.read(CHUNK_BYTES):
        if end := last_cut(block, cuts):
            yield b"".join([*held, block[:end]])
            held = []
            block = block[end:]
        if block:
            held.append(block)
    if held:
        yield b"".join(held)
