"""What a router counts, by hand and against float64 numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.model.moe.gates.gate import Choice
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.microbatch import Microbatch
from megatron_moe.model.moe.routing import Routing
from megatron_moe.model.moe.statistics import NUMBERS, RoutingStatistics

LOGITS = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0], [0.0, 0.0]])
EXPERTS = torch.tensor([[1, 0], [0, 1], [0, 1]])
CHOSEN = torch.tensor([[True, False], [True, False], [True, True]])
KEPT = torch.tensor([[True, False], [True, False], [False, True]])


def recorded(
    logits: Tensor | None,
    experts: Tensor,
    scores: Tensor,
    chosen: Tensor | None = None,
    kept: Tensor | None = None,
    padding: Tensor | None = None,
) -> dict[str, Any]:
    """The row of one microbatch, taken apart."""
    tokens, e = scores.shape
    statistics = RoutingStatistics(e)
    marks = None if padding is None else padding[:, None]
    microbatch = Microbatch(tokens, 1, MoEGroups(), marks, torch.device("cpu"))
    weights = torch.ones(experts.shape)
    statistics.record(
        logits, Choice(experts, weights, scores, chosen), Routing(experts, weights, kept), microbatch
    )
    rows = statistics.take()
    assert rows.dtype == torch.float64 and rows.shape == (1, statistics.width)
    routed, after, shares, numbers = rows[0].split([e, e, e, len(NUMBERS)])
    named = dict(zip(NUMBERS, numbers.tolist(), strict=True))
    return {"routed": routed.tolist(), "kept": after.tolist(), "scores": shares.tolist(), **named}


def test_sums_of_a_microbatch() -> None:
    row = recorded(LOGITS, EXPERTS, LOGITS.softmax(-1), CHOSEN, KEPT)
    assert row["routed"] == [2, 2]
    assert row["kept"] == [1, 2]
    assert row["scores"] == pytest.approx([0.25 + 0.9 + 0.5, 0.75 + 0.1 + 0.5])
    assert row["z_squares"] == pytest.approx(math.log(4) ** 2 + math.log(10) ** 2 + math.log(2) ** 2)
    assert [row["top1"], row["top2"], row["top3"]] == pytest.approx([0.75 + 0.9 + 0.5, 0.25 + 0.1 + 0.5, 0])
    of_tokens = [-sum(p * math.log(p) for p in (share, 1 - share)) for share in (0.25, 0.9, 0.5)]
    assert row["entropy"] == pytest.approx(sum(of_tokens))
    assert row["tokens"] == 3 and row["not_finite"] == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("e", "k"), [(8, 2), (8, 8), (3, 1)])
def test_against_numpy(e: int, k: int, padded: bool) -> None:
    """Sigmoid scores here: their shares of a token's sum."""
    t = 300
    logits = torch.randn(t, e, generator=torch.Generator().manual_seed(e + k)) * 3
    scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    experts = scores.topk(k).indices
    kept = torch.arange(t * k).view(t, k) % 5 > 0
    padding = torch.arange(t) % 7 < 3 if padded else None
    row = recorded(logits, experts, scores, None, kept, padding)

    valid = np.ones(t, bool) if padding is None else ~padding.numpy()
    z, p = logits.double().numpy()[valid], scores.double().numpy()[valid]
    chosen, there = experts.numpy()[valid], kept.numpy()[valid]
    ordered = -np.sort(-p, axis=1)
    assert row["routed"] == np.bincount(chosen.ravel(), minlength=e).tolist()
    assert row["kept"] == np.bincount(chosen[there], minlength=e).tolist()
    assert row["scores"] == pytest.approx(p.sum(0), rel=1e-6)
    assert row["z_squares"] == pytest.approx((np.log(np.exp(z).sum(1)) ** 2).sum(), rel=1e-6)
    assert row["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
    for rank in range(3):
        assert row[f"top{rank + 1}"] == pytest.approx(ordered[:, rank].sum(), rel=1e-6)
    assert row["tokens"] == valid.sum()


def test_equal_scores_are_told_apart() -> None:
    """The second largest of equal scores is as large as the first."""
    row = recorded(None, torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 4), 0.25))
    assert [row["top1"], row["top2"], row["top3"]] == [0.5, 0.5, 0.5]
    assert row["entropy"] == pytest.approx(2 * math.log(4))


def test_a_gate_without_logits() -> None:
    """Has no z-loss; a score of 0 adds nothing to the entropy."""
    row = recorded(None, torch.tensor([[1], [0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert math.isnan(row["z_squares"]) and row["entropy"] == 0.0 and row["not_finite"] == 0


def test_only_padding_counts_nothing() -> None:
    row = recorded(LOGITS, EXPERTS, LOGITS.softmax(-1), CHOSEN, KEPT, torch.ones(3, dtype=torch.bool))
    assert {name: value for name, value in row.items() if np.any(value)} == {}


def test_one_expert_has_no_second() -> None:
    row = recorded(LOGITS[:, :1], torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert [row["top1"], row["top2"], row["top3"]] == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_that_are_not_finite(value: float, padded: bool) -> None:
    """Also those of padding: it passes the experts."""
    logits = LOGITS.clone()
    logits[1, 0] = value
    padding = torch.tensor([False, True, False]) if padded else None
    assert recorded(logits, EXPERTS, LOGITS.softmax(-1), padding=padding)["not_finite"] == 1
    assert recorded(LOGITS * 1e30, EXPERTS, LOGITS.softmax(-1))["not_finite"] == 0


def test_each_microbatch_once() -> None:
    statistics = RoutingStatistics(2)
    choice, routing = (
        Choice(EXPERTS, torch.ones(3, 2), LOGITS.softmax(-1)),
        Routing(EXPERTS, torch.ones(3, 2)),
    )
    microbatch = Microbatch(3, 1, MoEGroups(), None, torch.device("cpu"))
    for _ in range(3):
        statistics.record(LOGITS, choice, routing, microbatch)
    assert len(statistics.take()) == 3
    statistics.record(LOGITS, choice, routing, microbatch)
    assert len(statistics.take()) == 1


def test_drops_of_evaluation_add_up() -> None:
    statistics = RoutingStatistics(2)
    choice = Choice(EXPERTS, torch.ones(3, 2), LOGITS.softmax(-1), CHOSEN)
    for padding in (None, torch.tensor([[False], [False], [True]])):
        microbatch = Microbatch(3, 1, MoEGroups(), padding, torch.device("cpu"))
        statistics.record_drops(choice, Routing(EXPERTS, torch.ones(3, 2), KEPT), microbatch)
    dropped = statistics.take_dropped()
    assert dropped is not None and dropped.tolist() == [4 + 2, 1]
    assert statistics.take_dropped() is None
