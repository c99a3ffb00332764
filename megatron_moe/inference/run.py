"""The sequences of one replica on their way: who is in the cache, and what the next step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_moe.inference.cache import Cache
from megatron_moe.inference.network import Network
from megatron_moe.inference.sampling import choose
from megatron_moe.inference.settings import Finish, Settings, Stop, Token
from megatron_moe.inference.step import Piece, Step


@dataclass
class _Sequence:
    """One that is being generated.

    Attributes:
        prompt: its number.
        tokens: the prompt's and those behind it.
        prompt_length: of these the prompt's.
        computed: of these those that are in the cache.
    """

    prompt: int
    tokens: list[int]
    prompt_length: int
    computed: int = 0

    @property
    def new(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class Run:
    """Prompts are taken in as others end, so that a step has as many sequences as there is room for.

    Those that are under way always have the first slots of the cache.

    Args:
        prompts: of all replicas.
        mine: numbers of those that this one continues.
    """

    def __init__(
        self,
        network: Network,
        prompts: Sequence[Sequence[int]],
        mine: Iterable[int],
        settings: Settings,
        stop: Stop | None,
    ) -> None:
        self.network, self.settings, self.stop = network, settings, stop
        self.waiting = deque(_Sequence(n, list(prompts[n]), len(prompts[n])) for n in mine)
        self.active: list[_Sequence] = []
        longest = max((len(sequence.tokens) for sequence in self.waiting), default=1)
        length = min(longest + settings.max_new_tokens, network.positions)
        self.cache = Cache(max(1, min(settings.batch, len(self.waiting))), length)

    @property
    def has_work(self) -> bool:
        return bool(self.active or self.waiting)

    def step(self) -> list[Token]:
        """Compute a step and choose a token for each sequence that is computed to its end. Without work, a
        step with a token that nobody asked for."""
        network = self.network
        while self.waiting and len(self.active) < self.cache.slots:
            self.active.append(self.waiting.popleft())
        pieces = self._pieces() or [Piece(0, 0, [0])]
        step = Step(tuple(pieces), network.device)
        hidden = network.hidden(step, self.cache)
        if not self.active:
            return []
        for piece in pieces:
            self.active[piece.slot].computed = piece.end
        ended = [(row, piece.slot) for row, piece in enumerate(pieces) if self._is_computed(piece.slot)]
        if not ended:
            return []
        chosen = torch.empty(len(ended), dtype=torch.int64, device=network.device)
        if hidden is not None:
            rows = hidden if step.is_one_each else hidden[step.last[[row for row, _ in ended]]]
            sequences = [self.active[slot] for _, slot in ended]
            chosen = choose(
                network.logits(rows),
                self.settings.sampling,
                [sequence.prompt for sequence in sequences],
                [len(sequence.tokens) for sequence in sequences],
            )
        return self._take([slot for _, slot in ended], network.from_last(chosen).tolist())

    def _is_computed(self, slot: int) -> bool:
        return self.active[slot].computed == len(self.active[slot].tokens)

    def _pieces(self) -> list[Piece]:
        """Prompts first, as much of them as a step takes; else the newest token of each sequence."""
        pieces, room = [], self.settings.prefill_tokens
        for slot, sequence in enumerate(self.active):
            missing = sequence.tokens[sequence.computed :]
            if sequence.computed < sequence.prompt_length and room > 0:
                pieces.append(Piece(slot, sequence.computed, missing[:room]))
                room -= len(missing)
        if pieces:
            return pieces
        return [Piece(slot, s.computed, s.tokens[s.computed :]) for slot, s in enumerate(self.active)]

    def _take(self, slots: list[int], tokens: list[int]) -> list[Token]:
        taken, done = [], []
        for slot, token in zip(slots, tokens, strict=True):
            sequence = self.active[slot]
            sequence.tokens.append(token)
            last = self._end_of(sequence)
            taken.append(Token(sequence.prompt, token, last))
            if last is not None:
                done.append(slot)
        for slot in reversed(done):
            self._leave(slot)
        return taken

    def _end_of(self, sequence: _Sequence) -> Finish | None:
        new = sequence.new
        if new[-1] in self.settings.ends or (self.stop is not None and self.stop(sequence.prompt, new)):
            return "stop"
        full = len(new) == self.settings.max_new_tokens or len(sequence.tokens) == self.cache.length
        return "length" if full else None

    def _leave(self, slot: int) -> None:
        """Let the last sequence have the slot of one that has ended."""
        last = self.active.pop()
        if slot < len(self.active):
            self.cache.move(len(self.active), slot, last.computed)
            self.active[slot] = last
