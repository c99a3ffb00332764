"""Our gates beside Megatron-Core's: the same where those are right, and where they are not what differs."""

from __future__ import annotations

from typing import Any

import gates_on_ranks as on_ranks
import pytest
import torch
from distributed import ranks
from torch import Tensor

from megatron_moe.config.schema import MoE
from megatron_moe.model.moe.draws import Draws
from megatron_moe.model.moe.gates import GATES
from megatron_moe.model.moe.gates.gate import GateInput
from megatron_moe.model.moe.gates.sinkhorn import balance
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.microbatch import Microbatch

T, E = 64, 8


def logits(seed: int = 0, tokens: int = T) -> Tensor:
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed))


def ours(values: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """[t, e] gate weights."""
    gate = GATES[options.get("moe_router_gate", "topk")](MoE(num_moe_experts=E, **options), 1)
    microbatch = Microbatch(len(values), 1, MoEGroups())
    choice = gate(GateInput(values[:, :1], values, microbatch, bias, Draws(microbatch, 1, 1)))
    weights: Tensor = torch.zeros_like(values).scatter(1, choice.experts, choice.weights)
    return weights


CASES: dict[str, dict[str, Any]] = {
    # Megatron-Core's arguments, which are the fields after `moe_router_`
    "softmax after": {"topk": 3},
    "softmax before": {"topk": 3, "pre_softmax": True},
    "sigmoid": {"topk": 3, "score_function": "sigmoid"},
    "sigmoid, one": {"topk": 1, "score_function": "sigmoid"},
    "sigmoid, bias, groups": {
        "topk": 4,
        "score_function": "sigmoid",
        "enable_expert_bias": True,
        "num_groups": 4,
        "group_topk": 2,
    },
    "softmax, a group an expert": {"topk": 2, "pre_softmax": True, "num_groups": 4, "group_topk": 2},
}


@pytest.mark.second_pair
@pytest.mark.parametrize("name", CASES)
def test_topk_is_megatrons(name: str) -> None:
    options = CASES[name]
    bias = torch.linspace(-0.3, 0.3, E) if "enable_expert_bias" in options else None
    theirs = {key: value for key, value in options.items() if key != "enable_expert_bias"}
    if "pre_softmax" in theirs:
        theirs["use_pre_softmax"] = theirs.pop("pre_softmax")
    weights, gradient = ranks(1).run(on_ranks.topk, logits(), theirs, bias)[0]
    x = logits().requires_grad_()
    actual = ours(x, bias, **{f"moe_router_{key}": value for key, value in options.items()})
    (actual * torch.linspace(-1, 1, actual.numel()).view_as(actual)).sum().backward()
    torch.testing.assert_close(actual, weights)
    torch.testing.assert_close(x.grad, gradient)


@pytest.mark.second_pair
def test_groups_of_softmax_scores_are_deepseek_v2s_here() -> None:
    """Its paper takes a group's largest score (section 2.2.2); Megatron-Core sums the k / M largest, which
    is V3's way. The best expert stands in the first group, the best pair in the second."""
    values = torch.tensor([[0.30, 0.01, 0.01, 0.01, 0.2, 0.2, 0.14, 0.13]]).log()
    theirs, _ = ranks(1).run(on_ranks.topk, values, {"topk": 2, "num_groups": 2, "group_topk": 1}, None)[0]
    mine = ours(values, moe_router_topk=2, moe_router_num_groups=2, moe_router_group_topk=1)
    assert theirs.nonzero()[:, 1].tolist() == [4, 5]
    assert mine.nonzero()[:, 1].tolist()[0] == 0


@pytest.mark.second_pair
def test_sinkhorn_is_megatrons_where_that_is_finite() -> None:
    balanced = ranks(1).run(on_ranks.sinkhorn, logits())[0]
    assert torch.equal((logits() + balance(logits())).topk(2).indices, balanced.topk(2).indices)


@pytest.mark.second_pair
def test_sinkhorn_of_large_logits() -> None:
    """Megatron-Core takes exp of them, and then routes by NaN."""
    large = logits() + 100
    assert not ranks(1).run(on_ranks.sinkhorn, large)[0].isfinite().all()
    assert torch.equal(
        (large + balance(large)).topk(2).indices, (logits() + balance(logits())).topk(2).indices
    )


@pytest.mark.second_pair
def test_sinkhorn_sees_the_whole_microbatch() -> None:
    """Megatron-Core balances over what a rank holds, so that the layout decides where tokens go; ours gathers
    it (test_router.py compares layouts)."""
    skewed = logits() + torch.linspace(0, 3, E)
    skewed[: T // 2] = skewed[: T // 2].flip(1)
    whole, first_half = ranks(1).run(on_ranks.sinkhorn, skewed)[0], skewed[: T // 2]
    alone = ranks(1).run(on_ranks.sinkhorn, first_half)[0]
    assert not torch.equal(alone.topk(2).indices, whole[: T // 2].topk(2).indices)
