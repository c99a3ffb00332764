"""What becomes of a sample where documents end: against Megatron-Core's own masks and positions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch import Tensor

from megatron_moe.config.schema import Data
from megatron_moe.data.samples import ApartAtEnds, apart_at_ends

EOD = 9
TEXTS = {
    "one whole document": [1, 2, 3, 4, 5, 6],
    "two": [1, 2, EOD, 3, 4, 5],
    "ends at its ends": [EOD, 1, 2, 3, 4, EOD],
    "an empty one": [1, EOD, EOD, 2, 3, EOD],
}


class Fixed:
    """One sample."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ones = torch.ones(len(self.tokens))
        return {"tokens": self.tokens, "loss_mask": ones, "position_ids": torch.arange(len(ones))}


@pytest.mark.second_pair
@pytest.mark.parametrize("tokens", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=3)))
def test_as_megatron_core(tokens: list[int], options: tuple[bool, bool, bool]) -> None:
    positions, attention, loss = options
    data = Data(reset_position_ids=positions, reset_attention_mask=attention, eod_mask_loss=loss)
    sample = ApartAtEnds(Fixed(tokens), data, EOD)[0]
    masked, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
        torch.tensor(tokens), EOD, positions, attention, loss, True
    )
    assert sample["loss_mask"].equal(loss_mask)
    assert sample["position_ids"].equal(position_ids)
    if attention:
        document = sample["document_starts"].cumsum(0)
        sees = (document[:, None] == document[None, :]).tril()
        assert sees.equal(~masked[0])
    else:
        assert "document_starts" not in sample


def test_samples_that_nothing_changes_are_the_datasets_own() -> None:
    samples = Fixed(TEXTS["two"])
    assert apart_at_ends(samples, Data(), EOD) is samples
    changed = apart_at_ends(samples, Data(eod_mask_loss=True), EOD)
    assert changed[0]["loss_mask"].sum() == 5
    assert np.array_equal(samples[0]["loss_mask"], np.ones(6)), "the dataset gives the same tensor each time"
