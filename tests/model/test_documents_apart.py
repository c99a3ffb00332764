"""Documents that share a sample and don't see each other: attention and the whole model compute what they
would for each document alone."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import attention_on_ranks
import documents_on_ranks
import pytest
import torch
from distributed import ranks
from experiments import MOE, experiment, layout
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_moe.engine.segments import segments
from megatron_moe.model import causal
from megatron_moe.model.attention import CoreAttention


def by_formula(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float = 8**-0.5) -> Tensor:
    """[s, b, n, d], [s, b, g, d] twice, [b, s] -> [s, b, n * d], with a mask of s x s."""
    share = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(share, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    document = starts.cumsum(1)
    sees = (document[:, :, None] == document[:, None, :]).tril()
    probs = scores.masked_fill(~sees[:, None], -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", probs, value).flatten(2)


def sample(length: int = 32, groups: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries, keys and values; the gradient that arrives; where documents begin."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(length, 2, heads, 8) for heads in (4, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(length, 2, 32, generator=generator, dtype=torch.float64)
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, [0, 1, 6, 9, 24]] = True  # among them one of a single token, and one over the middle
    starts[1, 0] = True
    return inputs, upstream, starts


def alone() -> CoreAttention:
    return CoreAttention(attention_on_ranks.settings(kv_channels=8), 1, None, "self")


def gradients(output: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@given(
    cuts=st.lists(st.lists(st.booleans(), min_size=16, max_size=16), min_size=1, max_size=3),
    size=st.sampled_from([1, 2, 4]),
)
def test_segments_tell_each_rank_what_its_queries_see(cuts: list[list[bool]], size: int) -> None:
    starts = torch.tensor(cuts)
    starts[:, 0] = True
    document, length = starts.cumsum(1), 16
    for rank in range(size):
        chunks = [0] if size == 1 else [rank, 2 * size - 1 - rank]
        width = length if size == 1 else length // (2 * size)
        asked = [(row, c * width + i) for c in chunks for row in range(len(cuts)) for i in range(width)]
        offered = [(row, p) for c in chunks for row in range(len(cuts)) for p in range((c + 1) * width)]
        for queries, keys in segments(starts, rank, size).tolist():
            mine, seen = asked[:queries], offered[:keys]
            asked, offered = asked[queries:], offered[keys:]
            for number, (row, position) in enumerate(mine):
                visible = seen[: keys - queries + number + 1]
                assert visible == [
                    (row, p) for p in range(position + 1) if document[row, p] == document[row, position]
                ]
        assert asked == offered == []


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_of_documents(groups: int) -> None:
    inputs, upstream, starts = sample(groups=groups)
    leaves = [x.requires_grad_() for x in inputs]
    actual = gradients(alone()(*leaves, segments(starts, 0, 1)), leaves, upstream)
    expected = gradients(by_formula(*leaves, starts), leaves, upstream)
    for mine, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.second_pair
def test_the_kernel_for_documents_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch's kernel does this: here one stands in for it that takes the same arguments."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*arguments: Any, **options: Any) -> Tensor:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        given = bound.arguments
        assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32
        assert given["window_size"] == (-1, 0), "causal"
        assert given["enable_gqa"] and given["max_q"] >= 15 and given["max_k"] >= 15
        ends = given["cu_seq_q"].tolist()
        assert given["cu_seq_k"].tolist() == ends
        parts = []
        for begin, end in itertools.pairwise(ends):
            x = (given[name][begin:end, None] for name in ("query", "key", "value"))
            whole = torch.arange(end - begin)[None] == 0
            parts.append(by_formula(*x, whole, given["scale"]).view(end - begin, -1, 8))
        return torch.cat(parts)

    inputs, _, starts = sample()
    monkeypatch.setattr(causal, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.testing.assert_close(
        alone()(*inputs, segments(starts, 0, 1)), by_formula(*inputs, starts), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("size", [2, 4])
def test_attention_of_documents_over_context_parallel_ranks(size: int) -> None:
    inputs, upstream, starts = sample()
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = gradients(by_formula(*leaves, starts), leaves, upstream)
    parts = ranks(size).run(attention_on_ranks.under_context, size, inputs, upstream, 8, starts)
    for index, exact in enumerate(expected):
        whole = attention_on_ranks.in_sequence([part[index] for part in parts])
        torch.testing.assert_close(whole, exact, rtol=1e-11, atol=1e-12)


def test_queries_fewer_than_keys_in_small_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a mask, the result is the same, and no mask is larger than allowed."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads, length in ((4, 12), (2, 30), (2, 30))
    )
    whole = causal.attend(query, key, value, scale=0.3)
    on_a_gpu = causal._attention(query, key, value, causal.Scores(0.3), mask=causal_lower_right(12, 30))
    torch.testing.assert_close(on_a_gpu, whole, rtol=1e-12, atol=0)
    largest = 0
    plain = causal._attention

    def watched(*arguments: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        nonlocal largest
        largest = max(largest, 0 if mask is None else mask.numel())
        return plain(*arguments, mask=mask, **options)

    monkeypatch.setattr(causal, "_attention", watched)
    monkeypatch.setattr(causal, "_MASK_ENTRIES", 100)
    torch.testing.assert_close(causal.attend(query, key, value, scale=0.3), whole, rtol=1e-12, atol=0)
    assert 0 < largest <= 100


PACKED = {
    "dense": {"moe": None},
    "experts": {"moe": {**MOE, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}},
    "learned positions": {
        "moe": None,
        "model": {"position_embedding_type": "learned_absolute"},
        "data": {"reset_position_ids": True},
    },
}


@pytest.mark.second_pair
@pytest.mark.parametrize("sections", PACKED.values(), ids=PACKED)
def test_the_model_computes_for_each_document_what_it_computes_for_it_alone(sections: dict) -> None:
    """Token losses and their gradients."""
    described = experiment(**{**sections, "data": {"kind": "mock"}}, parallel=layout())
    resets = "data" in sections
    (found,) = ranks(1).run(documents_on_ranks.packed_and_alone, described, resets)
    (packed, of_packed), (alone, of_alone), (mixed, _) = found
    torch.testing.assert_close(packed, alone, rtol=2e-5, atol=2e-6)
    assert not torch.allclose(mixed, alone, rtol=1e-3), "without their ends documents do see each other"
    for name, gradient in of_alone.items():
        error = (of_packed[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 2e-5, name
