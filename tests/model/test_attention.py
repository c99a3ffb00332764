"""Core attention against softmax(Q K^T * scale) V written out in float64."""

from __future__ import annotations

import math

import attention_on_ranks
import pytest
import torch
from distributed import ranks
from torch import Tensor

from megatron_moe.model.attention import CoreAttention


def by_formula(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[s, b, n, d], [s, b, g, d] twice -> [s, b, n * d]."""
    share = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(share, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    future = torch.ones(len(query), len(query)).triu(1).bool()
    probs = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", probs, value).flatten(2)


def sample(groups: int, length: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(length, 2, heads, 6) for heads in (4, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def alone(kv_channels: int = 6, softmax_scale: float | None = None) -> CoreAttention:
    config = attention_on_ranks.settings(kv_channels=kv_channels)
    return CoreAttention(config, 1, None, "self", softmax_scale=softmax_scale)


def gradients(output: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients(groups: int, scale: float | None) -> None:
    """Here the width of a head, 6, is not hidden / heads of anything."""
    leaves = [x.requires_grad_() for x in sample(groups)]
    upstream = torch.randn(16, 2, 24, dtype=torch.float64)
    actual = gradients(alone(softmax_scale=scale)(*leaves, None), leaves, upstream)
    expected = gradients(by_formula(*leaves, scale or 6**-0.5), leaves, upstream)
    for mine, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)


def test_bfloat16_stays_bfloat16() -> None:
    inputs = sample(2, dtype=torch.bfloat16)
    output = alone()(*inputs, None)
    assert output.dtype == torch.bfloat16
    exact = by_formula(*(x.double() for x in inputs), 6**-0.5)
    torch.testing.assert_close(output.double(), exact, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("option", ["packed_seq_params", "attention_bias"])
def test_what_it_does_not_compute_is_refused(option: str) -> None:
    with pytest.raises(AssertionError):
        alone()(*sample(2), None, **{option: torch.zeros(1)})


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_compute_what_one_does(size: int) -> None:
    inputs, upstream = sample(2, length=32), torch.randn(32, 2, 24, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = gradients(by_formula(*leaves, 6**-0.5), leaves, upstream)
    parts = ranks(size).run(attention_on_ranks.under_context, size, inputs, upstream, 6)
    for index, exact in enumerate(expected):
        whole = attention_on_ranks.in_sequence([part[index] for part in parts])
        torch.testing.assert_close(whole, exact, rtol=1e-11, atol=1e-12)


def test_tensor_parallel_ranks_drop_apart() -> None:
    """Each rank's heads are others of one layer, so that equal draws would tie them together."""
    inputs = sample(4)
    (first, second, evaluated, after), (other, _, _, after_other) = ranks(2).run(
        attention_on_ranks.dropped, False, inputs
    )
    assert not torch.equal(first, other)
    assert not torch.equal(first, second)
    torch.testing.assert_close(evaluated, by_formula(*inputs, 6**-0.5))
    # The default state, which the ranks share for what they hold both, must not drift apart.
    assert torch.equal(after, after_other)


def test_sequence_parallel_leaves_the_state_to_the_block() -> None:
    (first, *_), (other, *_) = ranks(2).run(attention_on_ranks.dropped, True, sample(4))
    assert torch.equal(first, other)
