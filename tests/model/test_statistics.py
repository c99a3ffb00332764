"""What a router counts, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_moe.model.moe.statistics import RoutingStatistics

LOGITS = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0], [0.0, 0.0]])
ROUTED = torch.tensor([[False, True], [True, False], [True, True]])
KEPT = torch.tensor([[False, True], [True, False], [False, True]])


def test_sums_of_a_microbatch() -> None:
    statistics = RoutingStatistics(num_experts=2)
    statistics.record(LOGITS, ROUTED, KEPT, valid=None)
    row = statistics.take()[0].tolist()
    assert len(row) == statistics.width
    assert row[0:2] == [2, 2]  # routed
    assert row[2:4] == [1, 2]  # kept
    assert row[4:6] == pytest.approx([0.25 + 0.9 + 0.5, 0.75 + 0.1 + 0.5])
    assert row[6] == pytest.approx(math.log(4) ** 2 + math.log(10) ** 2 + math.log(2) ** 2)
    assert row[7:9] == pytest.approx([0.75 + 0.9 + 0.5, 0.25 + 0.1 + 0.5])  # largest, second largest
    assert row[9] == 3


def test_padding_is_not_counted() -> None:
    with_padding, without = RoutingStatistics(2), RoutingStatistics(2)
    with_padding.record(LOGITS, ROUTED, KEPT, valid=torch.tensor([True, False, True]))
    without.record(LOGITS[[0, 2]], ROUTED[[0, 2]], KEPT[[0, 2]], valid=None)
    assert torch.equal(with_padding.take(), without.take())


def test_only_padding_counts_nothing() -> None:
    statistics = RoutingStatistics(2)
    statistics.record(LOGITS, ROUTED, KEPT, valid=torch.zeros(3, dtype=torch.bool))
    assert statistics.take().tolist() == [[0.0] * statistics.width]


def test_sigmoid_scores_are_normalised() -> None:
    statistics = RoutingStatistics(2)
    statistics.record(LOGITS[:1], ROUTED[:1], KEPT[:1], valid=None, sigmoid=True)
    assert statistics.take()[0, 4:6].tolist() == pytest.approx([0.5 / 1.25, 0.75 / 1.25])


def test_one_expert_has_no_second() -> None:
    statistics = RoutingStatistics(1)
    statistics.record(LOGITS[:, :1], ROUTED[:, :1], KEPT[:, :1], valid=None)
    assert statistics.take()[0, 4:6].tolist() == [3.0, 0.0]


def test_each_microbatch_once() -> None:
    statistics = RoutingStatistics(2)
    for _ in range(3):
        statistics.record(LOGITS, ROUTED, KEPT, valid=None)
    assert len(statistics.take()) == 3
    statistics.record(LOGITS, ROUTED, KEPT, valid=None)
    assert len(statistics.take()) == 1
