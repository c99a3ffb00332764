"""Which records a run reads, and how much of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.data.instruction.token_records import TokenRecords
from megatron_moe.data.parts import part_bounds


@dataclass(frozen=True)
class Selection:
    """The records of a part that fit into a sequence. A record of n tokens takes n - 1 places: its last token
    is predicted and never read."""

    records: TokenRecords
    numbers: NDArray[np.int64]
    """[n] numbers among all records."""
    places: NDArray[np.int64]
    """[n] places that each takes."""
    dropped: int
    """Records that are too long, or of which truncation leaves no target."""
    truncated: int
    """Records whose end was cut off."""


def bounds_of(experiment: Experiment, part: str, records: int) -> tuple[int, int]:
    """First record of a part and the one behind its last: of files of its own all, else by data.split."""
    section = experiment.data.instruction
    if section is None or section.validation is not None:
        return 0, records
    return part_bounds(experiment.data.split, records)[("training", "validation").index(part)]


def select(experiment: Experiment, part: str, records: TokenRecords) -> Selection:
    """The records of the training or validation part, by data.instruction.too_long.

    InputError where there are none, and under `error` for one that is too long.
    """
    section, seq_length = experiment.data.instruction, experiment.training.seq_length
    assert section is not None
    begin, end = bounds_of(experiment, part, records.manifest.records)
    lengths = records.lengths()[begin:end]
    numbers = np.arange(begin, end)
    is_long = lengths > seq_length + 1
    if is_long.any() and section.too_long == "error":
        raise InputError(_too_long(records, begin, lengths, seq_length))
    kept = ~is_long
    if section.too_long == "truncate":
        for number in np.flatnonzero(is_long).tolist():
            first = int(records.begins[begin + number])
            kept[number] = records.targets[first : first + seq_length + 1].any()
    places = np.minimum(lengths, seq_length + 1)[kept] - 1
    if not places.size:
        raise InputError(_nothing_left(experiment, part, len(lengths), lengths))
    return Selection(
        records, numbers[kept], places, dropped=int((~kept).sum()), truncated=int((kept & is_long).sum())
    )


def _too_long(records: TokenRecords, begin: int, lengths: NDArray[np.int64], seq_length: int) -> str:
    first = int((lengths > seq_length + 1).argmax())
    others = int((lengths > seq_length + 1).sum()) - 1
    more = f", and so have {others:,} more" if others else ""
    return (
        f"data.instruction.too_long: {records.place(begin + first)} has {lengths[first]:,} tokens, more than "
        f"training.seq_length {seq_length} + 1{more}; set training.seq_length to {lengths.max() - 1}, or "
        "too_long to drop or truncate"
    )


def _nothing_left(experiment: Experiment, part: str, count: int, lengths: NDArray[np.int64]) -> str:
    if not count:
        return (
            f"data.split: the {part} part of {experiment.data.split} holds no record; give it more, or name "
            "data.instruction.validation"
        )
    return (
        f"data.instruction.too_long: none of the {count:,} records of the {part} part fits into "
        f"training.seq_length {experiment.training.seq_length} + 1 tokens; the shortest has {lengths.min():,}"
    )
