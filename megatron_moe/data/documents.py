"""A chunk of an input file, and the documents in it; what to do with those that cannot be read.

Light on purpose: the worker processes of `data.preprocess` import it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.data.tokenizers import split_lines

Unit = Literal["file", "line", "paragraph"]
"""What one document is in a text file."""
BadRecords = Literal["error", "skip"]
"""What happens at a document that cannot be read."""
Complain = Callable[[str], None]
"""Takes the one-line description of a bad record, and raises it or keeps it."""

ICONV = "convert the file, for example with iconv"
_BLANK = " \t\r\n\x0b\x0c"
_KEYS_SHOWN = 10


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a text or jsonl file, or whole rows of a parquet file."""

    path: str
    first: int
    """Number of the first line or row, counted from 1."""
    payload: bytes
    """The lines; or the texts of the rows, one after the other."""
    unit: Unit | Literal["record", "row"]
    """What one document is; `record`: a line of jsonl."""
    ends_document: bool = True
    """False: the document goes on in the next chunk."""
    row_bytes: NDArray[np.int64] | None = None
    """Bytes of the text of each row, -1 for a row without one."""


def stop(problem: str) -> None:
    """The `Complain` of bad_records error."""
    raise InputError(problem)


def texts(chunk: Chunk, json_key: str, complain: Complain = stop) -> Iterator[str]:
    """The documents of a chunk in order, each exactly as it stands in the file, newlines included; some may
    be empty.

    What is not UTF-8, not JSON, or a record without a text at `json_key` is left out and handed to
    `complain`, with the file and the number of the line or row.
    """
    if chunk.unit == "row":
        return _rows(chunk, json_key, complain)
    if chunk.unit == "record":
        return _records(chunk, json_key, complain)
    try:
        text = chunk.payload.decode()
    except UnicodeDecodeError:
        return _readable_pieces(chunk, complain)
    return iter([text]) if chunk.unit == "file" else _pieces(text, chunk.unit)


def _pieces(text: str, unit: str) -> Iterator[str]:
    """The lines or paragraphs of a text that are not blank."""
    lines = split_lines(text)
    if unit == "line":
        yield from (line for line in lines if line.strip(_BLANK))
        return
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip(_BLANK):
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []


def _readable_pieces(chunk: Chunk, complain: Complain) -> Iterator[str]:
    """The documents of a chunk of text that are UTF-8 in spite of others that are not."""
    # Each byte becomes one character here, so that documents are found as they are in a text.
    raw = chunk.payload.decode("latin-1")
    line = chunk.first
    pieces = [raw] if chunk.unit == "file" else _pieces(raw, chunk.unit)
    end = 0
    for piece in pieces:
        begin = raw.index(piece, end)
        line += raw.count("\n", end, begin)
        end = begin + len(piece)
        payload = piece.encode("latin-1")
        try:
            yield payload.decode()
        except UnicodeDecodeError as error:
            wrong = line + payload.count(b"\n", 0, error.start)
            complain(f"{chunk.path}:{wrong}: {not_utf8(error)}; {ICONV}")
        line += piece.count("\n")


def _rows(chunk: Chunk, json_key: str, complain: Complain) -> Iterator[str]:
    assert chunk.row_bytes is not None
    end = 0
    for row, size in enumerate(chunk.row_bytes.tolist(), chunk.first):
        where = f"{chunk.path}: row {row}"
        if size < 0:
            complain(f"{where}: the column '{json_key}' is null, not a text")
            continue
        begin, end = end, end + size
        try:
            yield chunk.payload[begin:end].decode()
        except UnicodeDecodeError as error:
            complain(f"{where}: {not_utf8(error)}")


def _records(chunk: Chunk, json_key: str, complain: Complain) -> Iterator[str]:
    for number, line in enumerate(chunk.payload.split(b"\n"), chunk.first):
        if not line.strip():
            continue
        try:
            yield _text_of_record(line, json_key)
        except BadRecord as error:
            complain(f"{chunk.path}:{number}: {error}")


class BadRecord(Exception):
    """What is wrong with a record, in words that follow its place in the file."""


def json_object(line: bytes, example: str) -> dict[str, Any]:
    """The object that a line of jsonl holds; BadRecord that shows an `example` where it is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRecord(f"{not_utf8(error)}; {ICONV}") from None
    except (ValueError, RecursionError) as error:
        message = str(error).replace("line 1 column", "column")
        raise BadRecord(f"not JSON: {message}; a line holds one object like {example}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__}, where an object like {example} is needed")
    return record


def check_unicode(text: str) -> None:
    """BadRecord for a text that no UTF-8 has."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRecord(
                "the text holds half of a surrogate pair, which is no Unicode; remove it"
            ) from None


def _text_of_record(line: bytes, json_key: str) -> str:
    record = json_object(line, f'{{"{json_key}": "..."}}')
    text = record.get(json_key)
    if not isinstance(text, str):
        found = f"is {json.dumps(text)[:40]}, not a text" if json_key in record else "is missing"
        keys = [key for key, value in record.items() if isinstance(value, str)]
        others = ", ".join([*keys[:_KEYS_SHOWN], *["..."][: len(keys) - _KEYS_SHOWN > 0]])
        raise BadRecord(f"json_key '{json_key}' {found}; texts of this record: {others or 'none'}")
    check_unicode(text)
    return text


def not_utf8(error: UnicodeDecodeError) -> str:
    """The mistake of bytes that are no text."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
