"""What a dataset gives, and what becomes of a sample where documents end."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.config.schema import Data


class Samples(Protocol):
    """Samples by index.

    Each has `tokens`, `labels`, `position_ids` [s] int64 and `loss_mask` [s] float32, 0 where the label is no
    target. Datasets with padding or prompts also give `padding_mask` [s] bool, true for those tokens; and
    where documents must not see each other there is `document_starts` [s] bool, true where one begins. What
    records give beside these says `data.instruction.samples`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class ApartAtEnds:
    """Samples, changed where documents end, as the section `data` says.

    Megatron-Core's GPTDataset would do this with a mask of s x s for each sample.
    """

    def __init__(self, samples: Samples, data: Data, eod: int) -> None:
        self._samples = samples
        self._data = data
        self._eod = eod

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = dict(self._samples[index])
        ends = sample["tokens"] == self._eod
        starts = ends.roll(1)
        starts[0] = True
        if self._data.eod_mask_loss:
            sample["loss_mask"] = sample["loss_mask"].masked_fill(ends, 0.0)
        if self._data.reset_position_ids:
            places = torch.arange(len(ends))
            sample["position_ids"] = places - places.where(starts, torch.zeros_like(places)).cummax(0).values
        if self._data.reset_attention_mask:
            sample["document_starts"] = starts
        return sample


def apart_at_ends(samples: Samples, data: Data, eod: int) -> Samples:
    """`ApartAtEnds` where an option asks for it, else the samples as they are."""
    asked = data.eod_mask_loss or data.reset_position_ids or data.reset_attention_mask
    return ApartAtEnds(samples, data, eod) if asked else samples
