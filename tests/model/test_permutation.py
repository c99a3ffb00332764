"""Tokens sorted by expert and back, against a loop in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.model.moe.permutation import Permutation, sort_by_expert, to_experts, to_tokens

TOKENS, EXPERTS, HIDDEN = 13, 5, 4
KEPT = {
    "all": lambda shape: None,
    "all, as a mask": lambda shape: torch.ones(shape, dtype=torch.bool),
    "some": lambda shape: torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6,
    "none": lambda shape: torch.zeros(shape, dtype=torch.bool),
}


def routed(k: int, kept: str, tokens: int = TOKENS) -> tuple[Tensor, Tensor | None, Permutation]:
    generator = torch.Generator().manual_seed(k)
    # Nobody chooses expert 3.
    scores = torch.rand(tokens, EXPERTS, generator=generator).index_fill(1, torch.tensor(3), -1.0)
    experts = scores.topk(k).indices
    mask = KEPT[kept](experts.shape)
    return experts, mask, sort_by_expert(experts, mask, EXPERTS)


def by_loop(experts: Tensor, kept: Tensor | None) -> list[tuple[int, int, int]]:
    """(expert, token, choice) of each kept assignment, in the order that experts see."""
    found = [
        (int(experts[token, choice]), token, choice)
        for token in range(len(experts))
        for choice in range(experts.size(1))
        if kept is None or kept[token, choice]
    ]
    return sorted(found)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_order(k: int, kept: str) -> None:
    experts, mask, permutation = routed(k, kept)
    expected = by_loop(experts, mask)
    assert permutation.sources.tolist() == [token for _, token, _ in expected]
    assert permutation.assignments.tolist() == [token * k + choice for _, token, choice in expected]
    assert permutation.counts.tolist() == [
        sum(expert == e for expert, *_ in expected) for e in range(EXPERTS)
    ]
    rows = torch.full((TOKENS, k), len(expected))
    for row, (_, token, choice) in enumerate(expected):
        rows[token, choice] = row
    assert torch.equal(permutation.rows, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_there_and_back_with_gradients(k: int, kept: str, dtype: torch.dtype) -> None:
    experts, mask, permutation = routed(k, kept)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    factors = torch.rand(len(permutation.sources), 1, generator=generator).to(dtype)
    upstream = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    copies = to_experts(tokens, permutation)
    assert torch.equal(copies, tokens[permutation.sources])
    result = to_tokens(copies * factors, permutation)
    result.backward(upstream)
    assert tokens.grad is not None
    for given, found in ((tokens.detach(), result.detach()), (upstream, tokens.grad)):
        exact = np.zeros((TOKENS, HIDDEN))
        for row, (_, token, _) in enumerate(by_loop(experts, mask)):
            exact[token] += given[token].double().numpy() * float(factors[row])
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        np.testing.assert_allclose(found.double().numpy(), exact, rtol=tolerance, atol=2 * tolerance)


def test_no_tokens() -> None:
    _, _, permutation = routed(2, "all", tokens=0)
    tokens = torch.zeros(0, HIDDEN, requires_grad=True)
    result = to_tokens(to_experts(tokens, permutation), permutation)
    result.sum().backward()
    assert result.shape == tokens.shape and tokens.grad is not None
    assert permutation.counts.tolist() == [0] * EXPERTS


def test_broken_rows_stay_with_their_tokens() -> None:
    """A number that is none spreads to no token whose experts did not make it."""
    _, _, permutation = routed(2, "some")
    outputs = torch.ones(len(permutation.sources), HIDDEN)
    outputs[0] = float("nan")
    broken = to_tokens(outputs, permutation).isnan().any(1)
    assert broken.nonzero().flatten().tolist() == [int(permutation.sources[0])]


def test_more_experts_than_sixteen_bits_count() -> None:
    experts = torch.tensor([[40000, 2], [70000, 40000]])
    permutation = sort_by_expert(experts, None, 70001)
    assert permutation.sources.tolist() == [0, 0, 1, 1]
    assert permutation.counts.nonzero().flatten().tolist() == [2, 40000, 70000]
