"""Where documents begin and end in a microbatch, for attention that must not look past them."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor


def chunks_of_rank(context_rank: int, context_size: int) -> list[int]:
    """The chunks of the sequence that a context-parallel rank holds, out of twice the number of ranks.

    Megatron-Core's zig-zag, r and 2 CP - 1 - r, under which causal attention is as much work on each rank.
    One rank alone has the whole sequence as one chunk, 0.
    """
    return [0] if context_size == 1 else [context_rank, 2 * context_size - 1 - context_rank]


def segments(document_starts: Tensor, context_rank: int, context_size: int) -> Tensor:
    """[n, 2] int32: numbers of queries and of keys, one row after the other for each piece of a document.

    The queries of a segment are the last ones of its keys. They go through this rank's chunks, in each
    through the sequences of the microbatch, and there from left to right; the keys likewise, where a chunk's
    keys are those of its sequence from the first position to the chunk's last one. Keys that no query of the
    chunk may see are a segment without queries.

    Args:
        document_starts: [b, s] bool, on the host, true where a document begins; a sequence's first token
            counts as one in any case.
    """
    length = document_starts.size(1)
    parts = 1 if context_size == 1 else 2 * context_size
    rows = [np.union1d(np.flatnonzero(row), [0]) for row in document_starts.numpy()]
    found: list[tuple[int, int]] = []
    for chunk in chunks_of_rank(context_rank, context_size):
        begin, end = chunk * length // parts, (chunk + 1) * length // parts
        for starts in rows:
            first = int(starts[starts <= begin][-1])
            if first:
                found.append((0, first))
            bounds = [first, *starts[(starts > begin) & (starts < end)].tolist(), end]
            for left, right in itertools.pairwise(bounds):
                found.append((right - max(left, begin), right - left))
    return torch.tensor(found, dtype=torch.int32)
