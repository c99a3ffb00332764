"""Files of records as a row of chunks: lines of jsonl, and rows of parquet, which become such lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Instruction
from megatron_moe.config.text_files import suffix_of
from megatron_moe.data.documents import BadRecord, Chunk, json_object
from megatron_moe.data.inputs import CHUNK_BYTES, InputFile, open_input
from megatron_moe.data.instruction.messages import KNOWN_KEYS, Message, messages_of
from megatron_moe.data.parquet import ParquetFile

_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, ...]}'


def open_records(path: str, section: Instruction) -> InputFile:
    """Open a file. InputError if its name says no type that holds records, or as `data.inputs.open_input`."""
    suffix = suffix_of(path)
    if suffix.startswith(".txt"):
        raise InputError(f"{path}: is text without records; give jsonl or parquet files")
    if suffix == ".parquet":
        return _ParquetRecords(path, section)
    return open_input(path, "")


def conversations(
    chunk: Chunk, section: Instruction, complain: Callable[[str], None]
) -> Iterator[tuple[int, list[Message]]]:
    """The records of a chunk that are conversations, each with the number of its line or row; what is wrong
    with the others, and where they are, goes to `complain`."""
    for number, line in enumerate(chunk.payload.split(b"\n"), chunk.first):
        if not line.strip():
            continue
        try:
            yield number, messages_of(json_object(line, _EXAMPLE), section)
        except BadRecord as error:
            complain(f"{place(chunk.path, number)}: {error}")


def place(path: str, number: int) -> str:
    """Where a record is."""
    return f"{path}: row {number}" if suffix_of(path) == ".parquet" else f"{path}:{number}"


class _ParquetRecords(ParquetFile):
    """The rows of a parquet file, each an object of those columns that may hold a conversation."""

    def __init__(self, path: str, section: Instruction) -> None:
        keys = (section.messages_key, section.prompt_key, section.input_key, section.answer_key)
        self._wanted = {key for key in keys if key is not None} or KNOWN_KEYS
        super().__init__(path, "", CHUNK_BYTES)

    def _columns(self) -> list[str]:
        return self._there

    def _check_column(self, schema: Any) -> None:
        self._there = [name for name in schema.names if name in self._wanted]
        if not self._there:
            raise InputError(
                f"{self.path}: has none of the columns {', '.join(sorted(self._wanted))}; there are "
                f"{', '.join(schema.names)[:200] or 'none'}"
            )

    def _chunk(self, batch: Any) -> Chunk:
        lines = [json.dumps(row, default=_no_json).encode() for row in batch.to_pylist()]
        return Chunk(self.path, self._rows_read + 1, b"\n".join(lines), "record")


def _no_json(value: Any) -> dict[str, str]:
    """What JSON has no word for, such as bytes, so that it is not taken for a text."""
    return {type(value).__name__: str(value)}
