"""Random samples for benchmarks."""

from __future__ import annotations

import torch

from megatron_moe.data.mock import MockDataset


def test_a_sample_depends_on_seed_part_and_index_only() -> None:
    dataset = MockDataset(1000, 32, seed=5, part=0)
    again = MockDataset(1000, 32, seed=5, part=0)
    assert dataset[9]["tokens"].equal(again[9]["tokens"])
    others = [dataset[8], MockDataset(1000, 32, seed=6, part=0)[9], MockDataset(1000, 32, seed=5, part=1)[9]]
    assert not any(other["tokens"].equal(dataset[9]["tokens"]) for other in others)


def test_tokens_are_of_the_vocabulary_and_labels_follow_them() -> None:
    dataset = MockDataset(11, 4000, seed=0, part=0)
    sample = dataset[len(dataset) - 1]
    assert sample["tokens"].unique().equal(torch.arange(11))
    assert sample["tokens"][1:].equal(sample["labels"][:-1])
    assert sample["loss_mask"].equal(torch.ones(4000))
    assert sample["position_ids"].equal(torch.arange(4000))
