"""Causal attention of the last L of S tokens, whole or document by document, without a mask of L x S."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK_ENTRIES = 1 << 22
"""Largest mask that is made at once."""

_ROWS = 256
"""Queries that share a mask under a window: each takes the keys of the window, and of so many others."""


@dataclass(frozen=True)
class Scores:
    """What is made of Q K^T.

    Attributes:
        scale: its factor.
        dropout: probability, behind the softmax.
        window: keys that a query sees, its own the last; None: all up to its own.
        sinks: [n] a logit of each head that takes part in the softmax and brings nothing (gpt-oss); None: no
            such logits.
    """

    scale: float
    dropout: float = 0.0
    window: int | None = None
    sinks: Tensor | None = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T * scale) V, where query i sees the keys up to S - L + i, or the last ones of these.

    On the host queries that are fewer than their keys, and everywhere queries under a window, take small
    masks, some rows at a time; on a GPU torch's kernels know the other form of causality.

    Args:
        query: [b, n, L, d], the last L of S positions.
        key: [b, g, S, d]; g divides n.
        value: [b, g, S, d'].
        dropout, window, sinks: see `Scores`.

    Returns:
        [b, n, L, d'].
    """
    return _attend(query, key, value, Scores(scale, dropout, window, sinks))


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    width = value.size(-1)
    if scores.window is not None and scores.window >= key.size(2):
        scores = replace(scores, window=None)
    if scores.sinks is not None:
        query, key, value = _with_sinks(query, key, value, scores)
    # The key of the sinks is the first one: to be seen by all, as causality has it.
    leading = 0 if scores.sinks is None else 1
    if scores.window is not None:
        return _in_rows(query, key, value, scores, leading)[..., :width]
    length, keys = query.size(2), key.size(2)
    if length == keys:
        return _attention(query, key, value, scores, is_causal=True)
    if query.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        context = _attention(query, key, value, scores, mask=causal_lower_right(length, keys))
        return context[..., :width]
    return _in_rows(query, key, value, scores, leading)[..., :width]


def _with_sinks(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """A key before the first one, whose score is the head's sink and whose value is nothing, and for it one
    more channel; so that torch's attention computes sinks, and their gradient."""
    assert scores.sinks is not None
    sinks = (scores.sinks / scores.scale).to(query.dtype)[:, None, None]
    query = torch.cat([query, sinks.expand(query.size(0), -1, query.size(2), 1)], dim=-1)
    key, value = F.pad(key, (0, 1, 1, 0)), F.pad(value, (0, 1, 1, 0))
    key[:, :, 0, -1] = 1
    return query, key, value


def _in_rows(query: Tensor, key: Tensor, value: Tensor, scores: Scores, leading: int) -> Tensor:
    """`attend` some queries at a time, each with the keys that one of them sees.

    Args:
        leading: keys at the beginning that all see, beside those of the window.
    """
    before = key.size(2) - leading - query.size(2)
    window = scores.window or key.size(2)
    if scores.window is None:
        rows = _MASK_ENTRIES // key.size(2)
    else:
        rows = min(_ROWS, _MASK_ENTRIES // (window + _ROWS))
    parts, begin = [], before
    for part in query.split(max(1, rows), dim=2):
        first, end = max(0, begin - window + 1), begin + part.size(2)
        seen_keys, seen_values = (_seen(x, leading, first, end) for x in (key, value))
        mask = _mask(part.size(2), end - first, begin - first, window, leading, query.dtype, query.device)
        parts.append(_attention(part, seen_keys, seen_values, scores, mask=mask))
        begin = end
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _seen(x: Tensor, leading: int, first: int, end: int) -> Tensor:
    """[b, g, leading + S, d] -> the leading ones, and those from `first` to before `end` behind them."""
    if leading and first:
        return torch.cat([x[:, :, :leading], x[:, :, leading + first : leading + end]], dim=2)
    return x[:, :, : leading + end] if leading else x[:, :, first:end]


@lru_cache(maxsize=8)
def _mask(
    rows: int, keys: int, before: int, window: int, leading: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[rows, leading + keys] what is added to scores: 0 where query i sees a key, among them the last
    `window` up to key before + i; else minus infinity.

    Kept, because most rows of all layers have the same one, and autograd keeps each that it is given.
    """
    query = torch.arange(rows, device=device)[:, None] + before
    key = torch.arange(keys, device=device)[None]
    hidden = (key > query) | (key <= query - window)
    return F.pad(
        torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf), (leading, 0)
    )


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Tensor,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend`, segment by segment.

    Args:
        query: [tokens, n, d], the segments one after the other.
        key, value: [tokens', g, d], likewise.
        segments: [m, 2] int32, the numbers of queries and of keys of each (see `engine.segments`).

    Returns:
        [tokens, n, d].
    """
    scores = Scores(scale, dropout, window, sinks)
    if _has_kernel(query, key, value, scores):
        return _by_kernel(query, key, value, segments, scores)
    # Where there is no such kernel on a GPU, the host waits here for the numbers.
    numbers: list[list[int]] = segments.tolist()
    queries = query.split([queries for queries, _ in numbers])
    keys, values = (x.split([keys for _, keys in numbers]) for x in (key, value))
    parts = [
        _attend_tokens(*part, scores) for part in zip(queries, keys, values, strict=True) if part[0].size(0)
    ]
    return torch.cat(parts)


def _attend_tokens(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """`attend` of [L, n, d] to [S, g, d] twice -> [L, n, d]."""
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return _attend(query, key, value, scores).squeeze(0).transpose(0, 1)


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> bool:
    """Whether torch's attention over sequences of different lengths can take this.

    It has neither dropout nor sinks, and what it does with fewer queries than keys, which only context
    parallelism makes, is not documented.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and scores.dropout == 0.0
        and scores.sinks is None
        and query.size(0) == key.size(0)
        and query.size(-1) == value.size(-1)
        and query.size(-1) % 8 == 0
        and query.size(-1) <= 256
    )


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = F.pad(segments[:, 0].cumsum(0, dtype=torch.int32), (1, 0))
    longest = query.size(0)  # an upper bound will do, and needs no wait for the GPU
    context = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scores.scale,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    assert isinstance(context, Tensor)
    return context


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    grouped = query.size(1) != key.size(1)
    if grouped and query.is_cuda and query.dtype == torch.float32:
        # The kernel that spares the scores of s x s in fp32 knows no groups.
        key, value = (x.repeat_interleave(query.size(1) // key.size(1), dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        dropout_p=scores.dropout,
        scale=scores.scale,
        enable_gqa=grouped,
    )


def flatten(chunks: Sequence[Tensor]) -> Tensor:
    """Chunks [s_i, b, ...] -> [sum of b * s_i, ...], one after the other, in each one sequence after the
    other."""
    return torch.cat([chunk.transpose(0, 1).flatten(0, 1) for chunk in chunks])


def unflatten(tokens: Tensor, chunks: Sequence[Tensor]) -> Tensor:
    """Undo `flatten`: [sum of b * s_i, ...] -> [sum of s_i, b, ...], with the lengths of `chunks`."""
    parts = tokens.split([chunk.size(0) * chunk.size(1) for chunk in chunks])
    return torch.cat(
        [
            part.unflatten(0, (chunk.size(1), chunk.size(0))).transpose(0, 1)
            for part, chunk in zip(parts, chunks, strict=True)
        ]
    )
