"""What finetuning reports beside the loss a token: the loss a sample, and how full the sequences are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment

COUNTED = 3
"""Numbers that `tallies` adds to the report of a microbatch."""


@dataclass(frozen=True)
class SampleSums:
    """Sums over the global batch.

    Attributes:
        filled: places that hold a token of a record.
        loss: each sample's mean loss over its targets, added up.
        samples: their number.
    """

    filled: float
    loss: float
    samples: float


def counted(experiment: Experiment) -> int:
    """How many numbers the reports of this experiment have behind the others."""
    return COUNTED if experiment.data.kind == "instruction" else 0


def tallies(batch: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """[3] float64: the numbers of `SampleSums` of this rank's part of a microbatch.

    Args:
        losses: [b, s] of the next tokens.
    """
    weights = batch["sample_weights"].double()
    weighted = (losses.detach().double() * weights).sum()
    return torch.stack([batch["filled"].sum(dtype=torch.float64), weighted, weights.sum()])


def split_tallies(numbers: Sequence[float]) -> SampleSums | None:
    """The sums of all microbatches, by name; None where nothing was counted."""
    return SampleSums(*numbers) if numbers else None


def sample_metrics(sums: SampleSums, targets: float, places: int) -> dict[str, Any]:
    """Args:
    targets: of the global batch.
    places: tokens that its sequences have room for.
    """
    return {
        "sample_loss": sums.loss / sums.samples if sums.samples else math.nan,
        "data/targets": round(targets),
        "data/padding": 1 - sums.filled / places,
    }
