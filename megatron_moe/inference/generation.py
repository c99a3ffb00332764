"""Generation and likelihoods, for the commands and for anybody who has a `Network`.

Every function here is a collective over all ranks of the layout, each of which gives the same arguments and
gets the same results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.inference.network import Network
from megatron_moe.inference.run import Run
from megatron_moe.inference.settings import Generated, Settings, Stop, Token
from megatron_moe.inference.step import Piece, Step

_ROWS_OF_LOGITS = 256
"""Rows over the whole vocabulary that are made at once where likelihoods are asked for."""


class Likelihood(NamedTuple):
    """Of the end of a sequence.

    Attributes:
        log_probs: [n] natural logarithms of the probability of each of its tokens after those before it.
        is_greedy: each of them is the most likely one.
    """

    log_probs: Tensor
    is_greedy: bool


_T = TypeVar("_T")


class Generator:
    """Runs a network over prompts.

    Args:
        network: of this rank.
        data_group: ranks of the replicas, over which prompts are dealt out; None: there is one replica.
    """

    def __init__(self, network: Network, data_group: dist.ProcessGroup | None = None) -> None:
        self.network, self.data_group = network, data_group
        self.replicas = 1 if data_group is None else data_group.size()
        self.replica = 0 if data_group is None else data_group.rank()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        on_token: Callable[[Token], object] | None = None,
        stop: Stop | None = None,
    ) -> list[Generated]:
        """Continue each prompt, a list of token ids.

        Each continuation is what the prompt would get alone.

        Args:
            on_token: called on all ranks with each token as it comes, those of a prompt in order.
            stop: asked on all ranks of a replica after each token.

        A prompt has at least one token, and one fewer at most than the model has positions.
        """
        assert all(0 < len(prompt) < self.network.positions for prompt in prompts)
        results = [Generated() for _ in prompts]
        mine = range(self.replica, len(prompts), self.replicas)
        for tokens in self._rounds(Run(self.network, prompts, mine, settings, stop)):
            for token in tokens:
                results[token.prompt].tokens.append(token.token)
                results[token.prompt].finish = token.last
                if on_token is not None:
                    on_token(token)
        return results

    def log_likelihoods(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], tokens_at_once: int = 4096
    ) -> list[Likelihood]:
        """How likely the model finds sequences[i][starts[i]:], given what is before.

        Args:
            starts: at least 1 each: nothing is said about a first token.
            tokens_at_once: tokens of a step; a longer sequence takes one by itself.
        """
        for sequence, start in zip(sequences, starts, strict=True):
            assert 1 <= start <= len(sequence) <= self.network.positions
        mine = range(self.replica, len(sequences), self.replicas)
        own: dict[int, Likelihood] = {}
        batches = deque(_batches(sequences, mine, tokens_at_once))
        while self._any_left(bool(batches)):
            batch = batches.popleft() if batches else []
            own |= self._likelihoods(sequences, starts, batch)
        parts = self._of_replicas(own)
        found = {number: likelihood for part in parts for number, likelihood in part.items()}
        return [found[number] for number in range(len(sequences))]

    def _likelihoods(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], batch: list[int]
    ) -> dict[int, Likelihood]:
        network = self.network
        pieces = [Piece(slot, 0, sequences[number]) for slot, number in enumerate(batch)]
        step = Step(tuple(pieces) or (Piece(0, 0, [0]),), network.device)
        hidden = network.hidden(step, None)
        rows, begin = list[int](), 0
        for number in batch:
            length = len(sequences[number])
            rows += range(begin + starts[number] - 1, begin + length - 1)
            begin += length
        targets = [token for number in batch for token in sequences[number][starts[number] :]]
        values = torch.empty(2, len(rows), device=network.device)
        if hidden is not None:
            chosen = torch.tensor(rows, dtype=torch.int64, device=network.device)
            wanted = torch.tensor(targets, dtype=torch.int64, device=network.device)
            for of_rows, of_targets, out in zip(
                chosen.split(_ROWS_OF_LOGITS),
                wanted.split(_ROWS_OF_LOGITS),
                values.split(_ROWS_OF_LOGITS, dim=1),
                strict=True,
            ):
                logits = network.logits(hidden[of_rows])
                out[0] = logits.log_softmax(-1).gather(1, of_targets[:, None]).squeeze(1)
                out[1] = logits.argmax(-1) == of_targets
        log_probs, greedy = network.from_last(values).cpu()
        lengths = [len(sequences[number]) - starts[number] for number in batch]
        return {
            number: Likelihood(ours, bool(best.all()))
            for number, ours, best in zip(
                batch, log_probs.split(lengths), greedy.split(lengths), strict=bool(batch)
            )
        }

    def _rounds(self, run: Run) -> Iterator[list[Token]]:
        """What all replicas generate in each step. Those that are done go on with a token that nobody asked
        for: their experts may have to compute others'."""
        while self._any_left(run.has_work):
            own = run.step()
            yield [token for part in self._of_replicas(own) for token in part]

    def _any_left(self, left: bool) -> bool:
        if self.data_group is None:
            return left
        flag = torch.tensor([int(left)], device=self.network.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.data_group)
        return bool(flag.item())

    def _of_replicas(self, own: _T) -> list[_T]:
        if self.data_group is None:
            return [own]
        parts: list[_T | None] = [None] * self.replicas
        dist.all_gather_object(parts, own, group=self.data_group)
        return [part for part in parts if part is not None]


def _batches(sequences: Sequence[Sequence[int]], mine: Iterable[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of sequences that have at most so many tokens together, or of a single longer one."""
    batch: list[int] = []
    total = 0
    for number in mine:
        if batch and total + len(sequences[number]) > tokens:
            yield batch
            batch, total = [], 0
        batch.append(number)
        total += len(sequences[number])
    if batch:
        yield batch
