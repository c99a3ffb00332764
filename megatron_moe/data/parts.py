"""Which documents are for training, which for validation, and whether they are enough. No torch: asked before
any rank starts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.config.sources import PARTS, key_of, sources_of, split_of, weights_of


def part_bounds(weights: Sequence[float], documents: int) -> list[tuple[int, int]]:
    """First document of each part and the one behind its last: Megatron-Core's split, in file order."""
    shares = (np.array(weights, np.float64) / np.sum(weights)).tolist()
    ends = [round(share * documents) for share in itertools.accumulate(shares, initial=0.0)]
    return list(itertools.pairwise(ends))


def parts_read(experiment: Experiment, name: str) -> list[str]:
    """The parts that the experiment reads of a source; "" where the data is not blended. Nothing reads the
    test part yet."""
    read = PARTS[:1] if experiment.training.eval_interval is None else PARTS[:2]
    if not name:
        return list(read)
    weights = weights_of(experiment.data, sources_of(experiment.data)[name])
    return [part for part, weight in zip(PARTS, weights, strict=True) if weight != 0 and part in read]


def check_parts(experiment: Experiment, name: str, lengths: NDArray[np.int32]) -> None:
    """InputError where a part that the experiment reads of a source gives no sample.

    Args:
        name: of the source; "" where the data is not blended.
        lengths: tokens of each document.
    """
    source, seq_length = sources_of(experiment.data)[name], experiment.training.seq_length
    split = split_of(experiment.data, source)
    said, key = experiment.data.split, "data.split"
    if source.split is not None:
        said, key = source.split, f"{key_of(name)}.split"
    if not any(split):
        raise InputError(f"{key}: all weights are 0; set for example [95, 5]")
    bounds = dict(zip(PARTS, part_bounds(split, len(lengths)), strict=True))
    for part in parts_read(experiment, name):
        begin, end = bounds[part]
        found = int(lengths[begin:end].sum(dtype=np.int64))
        if found > seq_length:
            continue
        raise InputError(
            f"{key_of(name) if name else key}: the {part} part of {key + ' ' if name else ''}{said} holds "
            f"{end - begin:,} of {len(lengths):,} documents with {found:,} tokens, less than one sample of "
            f"training.seq_length {seq_length} + 1; take {_advice(name, part, found, len(lengths))}"
        )


def _advice(name: str, part: str, tokens: int, documents: int) -> str:
    """What would help a part with so few tokens, in a file of so many documents."""
    advice = (
        f"training.seq_length below {tokens}"
        if tokens > 2
        else "another split"
        if name
        else "another data.split"
    )
    if name:
        advice += f", no weight in that part ({key_of(name)}.weight: a list with a 0 there)"
    elif part == "validation":
        advice += ", leave training.eval_interval out"
    if documents < 100:
        key = f"{key_of(name)}.prepare.documents"
        advice += f", or more and smaller documents ({key}: paragraph)"
    return advice
