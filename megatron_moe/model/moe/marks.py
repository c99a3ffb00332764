"""What a router may need to know of a token beside its hidden state, in one integer.

Megatron-Core hands a `padding_mask` [b, s] through all layers, cuts it like the tokens and recomputes with
it. Where a router needs no more, it is such a mask, true for padding. Else each token's mark holds also its
number in the vocabulary, and its position: its place among all tokens that a run has consumed, by which
random gates draw, so that a layout does not change what they draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN_BITS = 22
"""Vocabularies up to 4 million."""
POSITION_BITS = 40
"""Positions up to 10^12; a longer run draws the same numbers again."""


def mark(padding: Tensor | None, tokens: Tensor, positions: Tensor) -> Tensor:
    """Marks [b, s] int64.

    Args:
        padding: [b, s] bool, true where a token counts neither in losses nor in statistics; None: nowhere.
        tokens: [b, s] numbers in the vocabulary.
        positions: [b, s].
    """
    positions = positions.long() & ((1 << POSITION_BITS) - 1)
    marks = (positions << TOKEN_BITS) | tokens.long()
    return marks if padding is None else marks | (padding.long() << (TOKEN_BITS + POSITION_BITS))


def padding_of(marks: Tensor) -> Tensor:
    """True where a token is padding."""
    return marks if marks.dtype == torch.bool else (marks >> (TOKEN_BITS + POSITION_BITS)).bool()


def tokens_of(marks: Tensor) -> Tensor:
    """Numbers in the vocabulary."""
    return marks & ((1 << TOKEN_BITS) - 1)


def positions_of(marks: Tensor) -> Tensor:
    """Places among all tokens of the run."""
    return (marks >> TOKEN_BITS) & ((1 << POSITION_BITS) - 1)
