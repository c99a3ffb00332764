"""Sliding windows and sinks in core attention, against the softmax written out in float64."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import attention_on_ranks
import pytest
import torch
from distributed import ranks
from torch import Tensor

from megatron_moe.engine.segments import segments
from megatron_moe.model import causal
from megatron_moe.model.attention import CoreAttention

LENGTH, HEADS, WIDTH = 32, 4, 6
SINKS = torch.tensor([0.5, -3.0, 2.0, 40.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    *,
    window: int | None = None,
    starts: Tensor | None = None,
    scale: float = WIDTH**-0.5,
) -> Tensor:
    """[s, b, n, d], [s, b, g, d] twice -> [s, b, n * d]: a token sees itself and the window - 1 before it, as
    in `transformers`, of its own document; a sink is one more logit, dropped behind the softmax."""
    share = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(share, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    place = torch.arange(len(query))
    sees = (place[None, :] <= place[:, None])[None]
    if window is not None:
        sees = sees & (place[None, :] > place[:, None] - window)
    if starts is not None:
        document = starts.cumsum(1)
        sees = sees & (document[:, :, None] == document[:, None, :])
    scores = scores.masked_fill(~sees[:, None], -math.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(-1)[..., : len(query)]
    return torch.einsum("bnst,tbnd->sbnd", probs, value).flatten(2)


def sample(groups: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries, keys and values; the gradient that arrives; where documents begin."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(LENGTH, 2, heads, WIDTH) for heads in (HEADS, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(LENGTH, 2, HEADS * WIDTH, generator=generator, dtype=torch.float64)
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, [0, 1, 6, 9, 24]] = True
    starts[1, 0] = True
    return inputs, upstream, starts


def fields(window: int | None, sinks: bool) -> dict[str, Any]:
    found: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}
    return found | ({"softmax_type": "learnable", "num_attention_heads": HEADS} if sinks else {})


def alone(window: int | None, sinks: bool, layer_number: int = 1, **config: Any) -> CoreAttention:
    settings = attention_on_ranks.settings(kv_channels=WIDTH, **fields(window, sinks), **config)
    attention = CoreAttention(settings, layer_number, None, "self")
    if sinks:
        attention.softmax_offset.data = SINKS.clone()
    return attention


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 5, 13, 32])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_values_and_gradients(
    groups: int, window: int | None, sinks: bool, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "_ROWS", 4)  # so that masks are made for several parts of the sequence
    inputs, upstream, starts = sample(groups)
    attention = alone(window, sinks)
    leaves = [*(x.requires_grad_() for x in inputs), *attention.parameters()]
    output = attention(*inputs, segments(starts, 0, 1) if documents else None)
    expected = by_formula(*leaves, window=window, starts=starts if documents else None)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
    pairs = (torch.autograd.grad(x, leaves, upstream) for x in (output, expected))
    for mine, exact in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(("size", "window"), [(2, 5), (2, 13), (4, 7), (2, None)])
def test_context_parallel_ranks_compute_what_one_does(size: int, window: int | None, documents: bool) -> None:
    inputs, upstream, starts = sample()
    leaves = [*(x.clone().requires_grad_() for x in inputs), SINKS.clone().requires_grad_()]
    output = by_formula(*leaves, window=window, starts=starts if documents else None)
    expected = [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
    *wholes, sinks = expected
    parts = ranks(size).run(
        attention_on_ranks.under_context,
        size,
        inputs,
        upstream,
        WIDTH,
        starts if documents else None,
        SINKS,
        window,
    )
    for index, exact in enumerate(wholes):
        whole = attention_on_ranks.in_sequence([part[index] for part in parts])
        torch.testing.assert_close(whole, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(part[-1] for part in parts), sinks, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("which", "layers"), [(None, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 2, 4]), ([0, 0, 1, 1], [3, 4])]
)
def test_layers_that_have_the_window(which: int | list[int] | None, layers: list[int]) -> None:
    inputs, _, _ = sample()
    narrow, wide = by_formula(*inputs, window=5), by_formula(*inputs)
    for number in range(1, 5):
        output = alone(5, False, number, window_attn_skip_freq=which)(*inputs, None)
        torch.testing.assert_close(output, narrow if number in layers else wide, rtol=1e-11, atol=1e-12)


def test_a_sink_without_weight_in_bfloat16_changes_nothing() -> None:
    inputs = [x.bfloat16() for x in sample()[0]]
    attention = alone(5, True)
    attention.softmax_offset.data = torch.full((HEADS,), -100.0, dtype=torch.bfloat16)
    output = attention(*inputs, None)
    assert output.dtype == torch.bfloat16
    exact = by_formula(*(x.double() for x in inputs), window=5)
    torch.testing.assert_close(output.double(), exact, rtol=3e-2, atol=3e-2)


def test_no_mask_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _, _ = sample()
    plain, largest = causal._attention, 0

    def watched(*arguments: Any, mask: Tensor | None = None, **options: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, 0 if mask is None else mask.numel())
        return plain(*arguments, mask=mask, **options)

    monkeypatch.setattr(causal, "_attention", watched)
    monkeypatch.setattr(causal, "_ROWS", 4)
    monkeypatch.setattr(causal, "_MASK_ENTRIES", 60)
    output = alone(10, False)(*inputs, None)
    torch.testing.assert_close(output, by_formula(*inputs, window=10), rtol=1e-11, atol=1e-12)
    assert 0 < largest <= 60


@pytest.mark.second_pair
def test_the_kernel_for_documents_is_given_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch's kernel does this, which counts the tokens before."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*arguments: Any, **options: Any) -> Tensor:
        bound = signature.bind(*arguments, **options)
        given = bound.arguments
        left, right = given["window_size"]
        assert (left, right) == (4, 0)
        parts = []
        for begin, end in itertools.pairwise(given["cu_seq_q"].tolist()):
            x = (given[name][begin:end, None] for name in ("query", "key", "value"))
            parts.append(by_formula(*x, window=left + 1).view(end - begin, -1, WIDTH))
        return torch.cat(parts)

    inputs, _, starts = sample()
    monkeypatch.setattr(causal, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    output = alone(5, False)(*inputs, segments(starts, 0, 1))
    expected = by_formula(*inputs, window=5, starts=starts)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
