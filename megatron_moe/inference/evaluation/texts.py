"""Loss on text: documents in windows, each token scored once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.data.documents import texts
from megatron_moe.data.inputs import open_input
from megatron_moe.inference.evaluation.questions import Answers, Encoder, Ending, Questions
from megatron_moe.inference.evaluation.result import Result
from megatron_moe.inference.evaluation.statistics import exponential, ratio


def windows(ids: list[int], length: int, stride: int) -> Iterator[Ending]:
    """A document as windows of at most `length` tokens, in which each token but the first is scored once.

    The first window scores all of its tokens but the first, each of the others the next `stride` ones, after
    as many before them as there is room for.
    """
    scored = 1
    while scored < len(ids):
        end = min(len(ids), length if scored == 1 else scored + stride)
        begin = max(0, end - length)
        yield Ending(ids[begin:end], scored - begin)
        scored = end


class AskedText:
    """The documents of some files.

    Args:
        name: of the report.
        length, stride: see `windows`.
        limit: at most so many documents.

    Raises InputError for what cannot be read, and where there is nothing to score.
    """

    def __init__(
        self,
        name: str,
        files: list[str],
        json_key: str,
        encoder: Encoder,
        length: int,
        stride: int,
        limit: int | None,
    ) -> None:
        self.name, self.length, self.stride = name, length, stride
        endings: list[Ending] = []
        self._documents: list[tuple[int, int, int]] = []  # windows, tokens and bytes of each
        for text in _documents(files, json_key, limit):
            ids = encoder.text(text)
            own = list(windows(ids, length, stride))
            unscored = "" if encoder.beginning else encoder.tokenizer.decode(ids[:1])
            if own:
                self._documents.append((len(own), len(ids) - 1, _bytes_behind(text, unscored)))
                endings += own
        if not endings:
            raise InputError(
                f"{name}: has no document of at least 2 tokens, of which the second is predicted"
            )
        self.questions = Questions(endings)
        self.notes = [f"windows of {length:,} tokens, stride {stride:,}"]

    def score(self, answers: Answers) -> Result:
        """`loss`: nats a token; `perplexity`; `bits_per_byte`: of UTF-8."""
        losses, begin = [], 0
        for count, _, _ in self._documents:
            losses.append(-math.fsum(answer.log_prob for answer in answers.endings[begin : begin + count]))
            begin += count
        tokens = [float(count) for _, count, _ in self._documents]
        loss = ratio(losses, tokens)
        metrics = {
            "loss": loss,
            "perplexity": exponential(loss),
            "bits_per_byte": ratio(
                [loss_of_it / math.log(2) for loss_of_it in losses],
                [float(size) for _, _, size in self._documents],
            ),
        }
        notes = [f"{int(math.fsum(tokens)):,} tokens, {', '.join(self.notes)}"]
        records: list[dict[str, Any]] = [
            {"document": number, "loss": loss_of_it, "tokens": count, "bytes": size}
            for number, (loss_of_it, (_, count, size)) in enumerate(
                zip(losses, self._documents, strict=True), 1
            )
        ]
        return Result(self.name, "text", len(records), metrics, notes, records)


def _documents(files: list[str], json_key: str, limit: int | None) -> Iterator[str]:
    """Texts that are not empty, each file of plain text one."""
    left = math.inf if limit is None else limit
    for path in files:
        file = open_input(path, json_key)
        try:
            for chunk in file.chunks("file", "nowhere"):
                for text in texts(chunk, json_key):
                    if left <= 0:
                        return
                    if text.strip():
                        left -= 1
                        yield text
        finally:
            file.close()


def _bytes_behind(text: str, first: str) -> int:
    """Bytes of a text without what its first token stands for."""
    return len(text.encode()) - (len(first.encode()) if text.startswith(first) else 0)
