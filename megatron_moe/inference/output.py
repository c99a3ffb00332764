"""Continuations as the user sees them: streamed to the terminal, and as JSON."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.errors import not_written
from megatron_moe.data.tokenizers import Tokenizer
from megatron_moe.inference.job import Job
from megatron_moe.inference.prompts import Prompt
from megatron_moe.inference.settings import Finish, Token
from megatron_moe.inference.text import TextStream

_CODES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What terminals obey."""


class Output:
    """Takes tokens of all prompts as they come, and writes the prompts' texts one after the other.

    The first that is not done yet is written as it grows; what comes of those behind it waits.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self.job, self.began = job, time.monotonic()
        self.streams = [streamed(job, tokenizer, prompt) for prompt in job.prompts]
        self.counts = [0] * len(job.prompts)
        self.finish: list[Finish | None] = [None] * len(job.prompts)
        self.current = 0
        self.waiting = [""] * len(job.prompts)
        self._begin()

    def take(self, token: Token) -> None:
        """One more token of a prompt."""
        stream = self.streams[token.prompt]
        self.counts[token.prompt] += 1
        text = stream.add(token.token)
        if token.last is not None:
            text += stream.end()
            self.finish[token.prompt] = token.last
        self.waiting[token.prompt] += text
        while self.current < len(self.streams):
            self._write(self.waiting[self.current])
            self.waiting[self.current] = ""
            if self.finish[self.current] is None:
                return
            self._end()
            self.current += 1
            self._begin()

    def close(self) -> None:
        """Write what is written at the end."""
        took, tokens = time.monotonic() - self.began, sum(self.counts)
        if self.job.output is not None:
            _write_whole(Path(self.job.output), self._records())
        if self.job.as_json:
            sys.stdout.write(self._records())
        elif sys.stderr.isatty():
            print(f"{tokens} tokens in {took:.1f} s, {tokens / took:.1f} tokens/s", file=sys.stderr)

    def _records(self) -> str:
        rows = zip(self.job.prompts, self.streams, self.counts, self.finish, strict=True)
        return "".join(
            json.dumps(_record(prompt, stream.text, count, finish), ensure_ascii=False) + "\n"
            for prompt, stream, count, finish in rows
        )

    def _begin(self) -> None:
        if self.current == len(self.streams):
            return
        prompt, count = self.job.prompts[self.current], len(self.streams)
        if count > 1:
            self._write(f"[{self.current + 1}/{count}] ")
        if not prompt.is_chat:
            self._write(prompt.text)

    def _end(self) -> None:
        self._write("\n")

    def _write(self, text: str) -> None:
        if self.job.as_json or not text:
            return
        if sys.stdout.isatty():
            text = _CODES.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        sys.stdout.write(text)
        sys.stdout.flush()


def streamed(job: Job, tokenizer: Tokenizer, prompt: Prompt) -> TextStream:
    """The text behind a prompt."""
    return TextStream(tokenizer, [] if prompt.is_chat else prompt.ids, set(job.hidden), job.stops)


def _record(prompt: Prompt, text: str, tokens: int, finish: Finish | None) -> dict[str, object]:
    return {
        "prompt": prompt.text,
        "text": text,
        "finish": finish,
        "prompt_tokens": len(prompt.ids),
        "tokens": tokens,
    }


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise not_written(f"{path}, which was to take the texts", error) from error


def stops_at(job: Job, tokenizer: Tokenizer) -> dict[int, TextStream]:
    """The texts that are watched for stops, by prompt."""
    if not job.stops:
        return {}
    return {number: streamed(job, tokenizer, prompt) for number, prompt in enumerate(job.prompts)}


def watched(streams: dict[int, TextStream], prompt: int, new: Sequence[int]) -> bool:
    """Whether the newest token of a prompt completes a stop."""
    stream = streams.get(prompt)
    if stream is None:
        return False
    stream.add(new[-1])
    return stream.stopped
