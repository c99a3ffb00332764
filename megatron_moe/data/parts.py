"""Which documents are for training, which for validation, and whether they are enough. No torch: asked before
any rank starts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment

PARTS = ("training", "validation", "test")


def part_bounds(weights: Sequence[float], documents: int) -> list[tuple[int, int]]:
    """First document of each part and the one behind its last: Megatron-Core's split, in file order."""
    shares = (np.array(weights, np.float64) / np.sum(weights)).tolist()
    ends = [round(share * documents) for share in itertools.accumulate(shares, initial=0.0)]
    return list(itertools.pairwise(ends))


def check_parts(experiment: Experiment, lengths: NDArray[np.int32]) -> None:
    """InputError where a part that the experiment reads gives no sample.

    Args:
        lengths: tokens of each document.
    """
    if not any(experiment.data.split):
        raise InputError("data.split: all weights are 0; set for example [95, 5]")
    training = experiment.training
    needed = PARTS[:1] if training.eval_interval is None else PARTS[:2]
    bounds = part_bounds(experiment.data.split, len(lengths))
    for part, (begin, end) in zip(needed, bounds, strict=False):
        found = int(lengths[begin:end].sum(dtype=np.int64))
        if found > training.seq_length:
            continue
        hint = f"training.seq_length below {found}" if found > 2 else "another data.split"
        if part == "validation":
            hint += ", leave training.eval_interval out"
        if len(lengths) < 100:
            hint += ", or more and smaller documents (data.prepare.documents: paragraph)"
        raise InputError(
            f"data.split: the {part} part of {experiment.data.split} holds {end - begin:,} of "
            f"{len(lengths):,} documents with {found:,} tokens, less than one sample of "
            f"training.seq_length {training.seq_length} + 1; take {hint}"
        )
