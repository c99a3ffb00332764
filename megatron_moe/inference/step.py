"""What one forward pass covers: pieces of sequences, one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that follow each other.

    Attributes:
        slot: where the cache has the sequence.
        start: position of the first of them; what is before it is in the cache.
        tokens: their numbers in the vocabulary.
    """

    slot: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Step:
    """Some pieces, each of another sequence.

    Attributes:
        device: of the tensors that are made of it.
    """

    pieces: tuple[Piece, ...]
    device: torch.device
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def count(self) -> int:
        """t, tokens of all pieces."""
        return sum(len(piece.tokens) for piece in self.pieces)

    @cached_property
    def tokens(self) -> Tensor:
        """[t]."""
        return self._tensor([token for piece in self.pieces for token in piece.tokens])

    @cached_property
    def positions(self) -> Tensor:
        """[t]."""
        return self._tensor([p for piece in self.pieces for p in range(piece.start, piece.end)])

    @cached_property
    def slots(self) -> Tensor:
        """[t]."""
        return self._tensor([piece.slot for piece in self.pieces for _ in piece.tokens])

    @cached_property
    def last(self) -> Tensor:
        """[pieces] the last token of each."""
        ends, end = [], 0
        for piece in self.pieces:
            end += len(piece.tokens)
            ends.append(end - 1)
        return self._tensor(ends)

    @cached_property
    def is_one_each(self) -> bool:
        """One token of each of the sequences in the first slots: the usual step."""
        return all(len(p.tokens) == 1 and p.slot == slot for slot, p in enumerate(self.pieces))

    @cached_property
    def longest(self) -> int:
        """Keys that the longest sequence has behind this step."""
        return max(piece.end for piece in self.pieces)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Of a step with one token each: [pieces, 1, 1, longest] to be added to the scores, 0 for keys that
        the token sees and minus infinity for others. None where every token sees all.

        Args:
            window: how many keys a token sees, itself counted; None: all before it.
        """
        if window not in self._masks:
            self._masks[window] = self._made(window, dtype)
        return self._masks[window]

    def _made(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        shortest = min(piece.end for piece in self.pieces)
        if shortest == self.longest and (window is None or window >= self.longest):
            return None
        keys = torch.arange(self.longest, device=self.device)
        ends = self.positions[:, None] + 1
        unseen = keys >= ends
        if window is not None:
            unseen |= keys < ends - window
        mask = torch.zeros(unseen.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(unseen, -torch.inf)[:, None, None, :]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)
