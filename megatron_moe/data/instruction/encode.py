"""What a worker process does with a chunk of records. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Instruction
from megatron_moe.data.documents import BadRecord, Chunk, stop
from megatron_moe.data.encode import FIRST_NAMED
from megatron_moe.data.instruction.chat import Chat
from megatron_moe.data.instruction.record_files import conversations, place


@dataclass(frozen=True)
class RecordEncoder:
    """All that turns records into tokens."""

    chat: Chat
    section: Instruction
    dtype: type[np.integer[Any]]


@dataclass(frozen=True)
class EncodedRecords:
    """The records of one chunk, each up to its last target."""

    tokens: NDArray[Any]
    """[t] ids of all records, one after the other."""
    targets: NDArray[np.bool_]
    """[t] whether a token is an answer's."""
    lengths: NDArray[np.int64]
    """[records] tokens of each."""
    numbers: NDArray[np.int64]
    """[records] its line or row in the file."""
    bad_records: int
    """Records that could not be read, or have no answer, and were left out."""
    first_bad: tuple[str, ...]
    """What is wrong with the first ones, and where they are."""


def encode_records(encoder: RecordEncoder, chunk: Chunk) -> EncodedRecords:
    """Tokenize the records of a chunk. InputError, with file and line, for what cannot be used, unless such
    records are skipped."""
    bad: list[str] = []
    complain = stop if encoder.section.bad_records == "error" else bad.append
    ids: list[NDArray[Any]] = [np.zeros(0, encoder.dtype)]
    marks: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
    numbers: list[int] = []
    for number, messages in conversations(chunk, encoder.section, complain):
        try:
            found, targets = encoder.chat.encode(messages, encoder.section.answers)
            if not targets[1:].any():
                raise BadRecord("none of its tokens is an answer's")
        except (BadRecord, InputError) as error:
            complain(f"{place(chunk.path, number)}: {error}")
            continue
        # Nothing is learned from what follows the last answer, and nothing before it sees that.
        behind = int(np.flatnonzero(targets)[-1]) + 1
        ids.append(found[:behind].astype(encoder.dtype))
        marks.append(targets[:behind])
        numbers.append(number)
    return EncodedRecords(
        np.concatenate(ids),
        np.concatenate(marks),
        np.array([part.size for part in ids[1:]], np.int64),
        np.array(numbers, np.int64),
        bad_records=len(bad),
        first_bad=tuple(bad[:FIRST_NAMED]),
    )
