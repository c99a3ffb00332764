"""Tokens are drawn as asked: from what transformers leaves of the vocabulary, as often as it should be."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_moe.inference.sampling import Sampling, choose, distribution


@pytest.mark.parametrize("top_k", [None, 1, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.01])
def test_what_is_left_is_what_transformers_leaves(top_k: int | None, top_p: float) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.zeros(5, 1, dtype=torch.int64)
    exact = TemperatureLogitsWarper(0.7)(ids, logits)
    exact = exact if top_k is None else TopKLogitsWarper(top_k)(ids, exact)
    exact = (exact if top_p == 1 else TopPLogitsWarper(top_p)(ids, exact)).softmax(-1)
    found = distribution(logits, Sampling(0.7, top_k, top_p))
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), exact)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    shares, count = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05]), 4000
    logits = shares.log().repeat(count, 1)
    tokens = choose(logits, Sampling(1.0), list(range(count)), [0] * count)
    found = tokens.bincount(minlength=5) / count
    assert found[1] == 0
    torch.testing.assert_close(found, shares, rtol=0, atol=0.03)


def test_a_draw_depends_on_seed_prompt_and_position_alone() -> None:
    logits = torch.zeros(6, 1000)
    where = [3, 3, 4, 4, 9, 9], [0, 1, 0, 1, 7, 8]
    tokens = choose(logits, Sampling(1.0, seed=2), *where).tolist()
    assert len(set(tokens)) == 6
    turned = choose(logits, Sampling(1.0, seed=2), where[0][::-1], where[1][::-1]).tolist()
    assert turned == tokens[::-1]
    assert choose(logits, Sampling(1.0, seed=3), *where).tolist() != tokens


def test_greedy_takes_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.0]])
    assert choose(logits, Sampling(), [0, 1], [0, 0]).tolist() == [1, 0]
