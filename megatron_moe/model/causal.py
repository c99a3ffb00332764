"""Causal attention of the last L of S tokens, whole or document by document, without a mask of L x S."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK_ENTRIES = 1 << 22
"""Largest mask that is made at once."""


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(Q K^T * scale) V, where query i sees the keys up to S - L + i.

    On the host queries that are fewer than their keys take small masks, some rows at a time; on a GPU torch's
    kernels know this form of causality.

    Args:
        query: [b, n, L, d], the last L of S positions.
        key: [b, g, S, d]; g divides n.
        value: [b, g, S, d'].

    Returns:
        [b, n, L, d'].
    """
    length, keys = query.size(2), key.size(2)
    if length == keys:
        return _attention(query, key, value, scale, dropout, is_causal=True)
    if query.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        return _attention(query, key, value, scale, dropout, mask=causal_lower_right(length, keys))
    rows = max(1, _MASK_ENTRIES // keys)
    parts, end = [], 0
    for part in query.split(rows, dim=2):
        end += part.size(2)
        seen = keys - length + end
        mask = torch.ones(part.size(2), seen, dtype=torch.bool, device=query.device).tril(seen - part.size(2))
        parts.append(_attention(part, key[:, :, :seen], value[:, :, :seen], scale, dropout, mask=mask))
    return torch.cat(parts, dim=2)


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`attend`, segment by segment.

    Args:
        query: [tokens, n, d], the segments one after the other.
        key, value: [tokens', g, d], likewise.
        segments: [m, 2] int32, the numbers of queries and of keys of each (see `engine.segments`).

    Returns:
        [tokens, n, d].
    """
    if _has_kernel(query, key, value, dropout):
        return _by_kernel(query, key, value, segments, scale)
    # Where there is no such kernel on a GPU, the host waits here for the numbers.
    numbers: list[list[int]] = segments.tolist()
    queries = query.split([queries for queries, _ in numbers])
    keys, values = (x.split([keys for _, keys in numbers]) for x in (key, value))
    parts = [
        _attend_tokens(*part, scale, dropout)
        for part in zip(queries, keys, values, strict=True)
        if part[0].size(0)
    ]
    return torch.cat(parts)


def _attend_tokens(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """`attend` of [L, n, d] to [S, g, d] twice -> [L, n, d]."""
    batched = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return attend(*batched, scale=scale, dropout=dropout).squeeze(0).transpose(0, 1)


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's attention over sequences of different lengths can take this.

    It has no dropout, and what it does with fewer queries than keys, which only context parallelism makes, is
    not documented.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0.0
        and query.size(0) == key.size(0)
        and query.size(-1) == value.size(-1)
        and query.size(-1) % 8 == 0
        and query.size(-1) <= 256
    )


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float) -> Tensor:
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
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    assert isinstance(context, Tensor)
    return context


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
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
        dropout_p=dropout,
        scale=scale,
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
