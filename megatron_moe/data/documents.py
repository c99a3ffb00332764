"""Text and jsonl files, plain or gzipped: cut into chunks of whole lines, and a chunk into documents.

Light on purpose: the worker processes of `data.preprocess` import it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

from megatron_moe.config.errors import InputError
from megatron_moe.data.tokenizers import split_lines

Unit = Literal["file", "line", "paragraph"]
"""What one document is in a text file."""

CHUNK_BYTES = 1 << 20
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = " \t\r\n\x0b\x0c"


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one input file."""

    path: str
    first_line: int
    """Number of the first line, counted from 1."""
    payload: bytes
    unit: Unit | Literal["record"]
    """What one document is; `record`: a line of jsonl."""
    ends_document: bool = True
    """False: the document goes on in the next chunk."""


class InputFile:
    """One input file, read once from front to back; its bytes are counted and hashed on the way."""

    def __init__(self, path: str) -> None:
        """Open the file. InputError if its name says no known type, or it is missing, unreadable or empty."""
        self.path = path
        name = path.lower()
        if not name.endswith(SUFFIXES):
            raise InputError(
                f"{path}: unknown type of input; the name has to end in one of {', '.join(SUFFIXES)}"
            )
        self._is_gzip = name.endswith(".gz")
        self._is_jsonl = name.removesuffix(".gz").endswith(".jsonl")
        try:
            self._raw = _HashingFile(path)
            self._reader = io.BufferedReader(self._raw, CHUNK_BYTES)
            if not self._reader.peek(1):
                raise InputError(_empty(path))
        except OSError as error:
            raise InputError(f"{path}: cannot read the input: {error.strerror}") from None

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as it lies on disk, that were read so far."""
        return self._raw.bytes_read

    @property
    def sha256(self) -> str:
        """Of the bytes read so far: once all chunks were taken, of the file as it lies on disk."""
        return self._raw.hash.hexdigest()

    def close(self) -> None:
        self._reader.close()

    def chunks(self, unit: Unit, may_split: bool) -> Iterator[Chunk]:
        """The file in order. `may_split`: a document that is a whole file may come in several chunks.

        InputError where the file cannot be read or unpacked.
        """
        kind: Unit | Literal["record"] = "record" if self._is_jsonl else unit
        stream: io.BufferedIOBase = gzip.GzipFile(fileobj=self._reader) if self._is_gzip else self._reader
        line = 1
        is_empty = True
        try:
            for block, following in pairwise(chain(_blocks(stream, kind, may_split), [b""])):
                payload = block.removeprefix(_BYTE_ORDER_MARK) if line == 1 else block
                ends_document = kind != "file" or not following
                is_empty = is_empty and not payload
                yield Chunk(self.path, line, payload, kind, ends_document)
                line += block.count(b"\n")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{self.path}: not a gzip file, or a damaged one: {error}") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot read the input: {error.strerror}") from None
        if is_empty:
            raise InputError(_empty(self.path))


def texts(chunk: Chunk, json_key: str) -> Iterator[str]:
    """The documents of a chunk in order, each exactly as it stands in the file, newlines included; some may
    be empty.

    InputError, with the line's number, for what is not UTF-8, not JSON, or a record without a text at
    `json_key`.
    """
    if chunk.unit == "record":
        for number, record in enumerate(chunk.payload.split(b"\n"), chunk.first_line):
            if record.strip():
                yield _text_of_record(f"{chunk.path}:{number}", record, json_key)
        return
    text = _decode(chunk)
    if chunk.unit == "file":
        yield text
        return
    lines = split_lines(text)
    if chunk.unit == "line":
        yield from (line for line in lines if line.strip(_BLANK))
        return
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip(_BLANK):
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []


def file_sha256(path: str) -> str:
    """The SHA-256 of a file's bytes. InputError if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot read the input: {error.strerror}") from None


def _empty(path: str) -> str:
    return f"{path}: the file is empty; give one that holds text"


class _HashingFile(io.RawIOBase):
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


def _blocks(stream: io.BufferedIOBase, kind: str, may_split: bool) -> Iterator[bytes]:
    """The stream in blocks of about CHUNK_BYTES that end where a line, or a paragraph, ends."""
    if kind == "file" and not may_split:
        yield stream.read()
        return
    while block := stream.read(CHUNK_BYTES):
        parts = [block, stream.readline()]
        if kind == "paragraph":
            parts += _through_blank_line(stream)
        yield b"".join(parts)


def _through_blank_line(stream: io.BufferedIOBase) -> Iterator[bytes]:
    while line := stream.readline():
        yield line
        if not line.strip():
            return


def _decode(chunk: Chunk) -> str:
    try:
        return chunk.payload.decode()
    except UnicodeDecodeError as error:
        line = chunk.first_line + chunk.payload.count(b"\n", 0, error.start)
        raise InputError(_not_utf8(f"{chunk.path}:{line}", error)) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where}: not UTF-8 (byte 0x{byte:02x}); convert the file, for example with iconv"


def _text_of_record(where: str, line: bytes, json_key: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(where, error)) from None
    except (ValueError, RecursionError) as error:
        message = str(error).replace("line 1 column", "column")
        raise InputError(
            f'{where}: not JSON: {message}; a line holds one object like {{"text": "..."}}'
        ) from None
    if not isinstance(record, dict):
        raise InputError(
            f'{where}: a JSON {type(record).__name__}, where an object like {{"{json_key}": "..."}} is needed'
        )
    text = record.get(json_key)
    if not isinstance(text, str):
        found = f"is {json.dumps(text)[:40]}, not a text" if json_key in record else "is missing"
        others = ", ".join(key for key, value in record.items() if isinstance(value, str))
        raise InputError(f"{where}: json_key '{json_key}' {found}; texts of this record: {others or 'none'}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: the text holds half of a surrogate pair, which is no Unicode; remove it"
        ) from None
    return text
