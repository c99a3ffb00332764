"""One rank of `eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_moe.convert.models import open_model
from megatron_moe.data.tokenizers import Tokenizer
from megatron_moe.inference.building import build
from megatron_moe.inference.command import block_of, join
from megatron_moe.inference.evaluation.job import EvalJob
from megatron_moe.inference.evaluation.parity import compare
from megatron_moe.inference.evaluation.questions import Answer, Answers, Continuations, Ending, Questions
from megatron_moe.inference.generation import Generator
from megatron_moe.inference.layout import inference_experiment
from megatron_moe.inference.output import watched
from megatron_moe.inference.prompts import ends_of, hidden_of, tokenizer_of
from megatron_moe.inference.quantized import quantize
from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.settings import Settings, Token
from megatron_moe.inference.text import TextStream

_TOKENS_AT_ONCE = 4096
_STEPS_A_PORTION = 4

Advance = Callable[[int], object]
"""Told how many questions were answered."""


def run(job: EvalJob) -> int:
    """Answer what a job asks; rank 0 writes it. RANK and the like name the rank, or there is one only.
    Returns the exit code. Raises InputError."""
    device = join()
    model = open_model(job.model)
    tokenizer = tokenizer_of(model)
    dtype = device.resolve_precision("auto" if job.dtype == "fp8" else job.dtype)
    generator = build(inference_experiment(model.experiment, job.overrides), model.weights, device, dtype)
    if job.dtype == "fp8":
        quantize(generator.network, block_of(model))
    ends = ends_of(model, tokenizer)
    answering = Answering(generator, tokenizer, ends, hidden_of(tokenizer, ends), job.batch, job.is_chat)
    with _progress(job) as advance:
        answers = [answering.answers(asked, advance) for asked in job.questions]
        compared = None if job.comparison is None else compare(generator, job.comparison, dtype, advance)
    if dist.get_rank() == 0:
        found = {
            "answers": [{"endings": of_one.endings, "texts": of_one.texts} for of_one in answers],
            "comparison": compared,
            "dtype": "fp8" if job.dtype == "fp8" else str(dtype).removeprefix("torch."),
        }
        Path(job.found).write_text(json.dumps(found))
    return 0


class Answering:
    """Answers questions with a model. Collective over all ranks of its layout.

    Args:
        ends: ids that end a text.
        hidden: ids that stand for none.
        batch: continuations at once.
        is_chat: continuations are answers, and not parts of their prompts' texts.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        ends: set[int],
        hidden: set[int],
        batch: int,
        is_chat: bool,
    ) -> None:
        self.generator, self.tokenizer, self.batch, self.is_chat = generator, tokenizer, batch, is_chat
        self.ends, self.hidden = ends, hidden

    def answers(self, asked: Questions, advance: Advance = lambda count: None) -> Answers:
        continued = [] if asked.continuations is None else self.texts(asked.continuations, advance)
        return Answers(self.endings(asked.endings, advance), continued)

    def endings(self, asked: Sequence[Ending], advance: Advance = lambda count: None) -> list[Answer]:
        """How likely each ending is."""
        found = []
        most = _TOKENS_AT_ONCE * _STEPS_A_PORTION * self.generator.replicas
        for portion in _portions(asked, most):
            sequences, starts = [one.ids for one in portion], [one.start for one in portion]
            for likelihood in self.generator.log_likelihoods(sequences, starts, _TOKENS_AT_ONCE):
                found.append(Answer(likelihood.log_probs.double().sum().item(), likelihood.is_greedy))
            advance(len(portion))
        return found

    def texts(self, asked: Continuations, advance: Advance = lambda count: None) -> list[str]:
        """How each prompt goes on."""
        sampling = Sampling(asked.temperature, None, asked.top_p, asked.seed)
        settings = Settings(asked.max_new_tokens, sampling, sorted(self.ends), self.batch)
        streams = {number: self._stream(asked, number) for number in range(len(asked.prompts))}

        def count(token: Token) -> None:
            advance(token.last is not None)

        stop = partial(watched, streams) if asked.stops else None
        generated = self.generator.generate(asked.prompts, settings, count, stop)
        found = []
        for number, continuation in enumerate(generated):
            stream = self._stream(asked, number)
            for token in continuation.tokens:
                stream.add(token)
            stream.end()
            found.append(stream.text)
        return found

    def _stream(self, asked: Continuations, number: int) -> TextStream:
        before = [] if self.is_chat else asked.prompts[number]
        return TextStream(self.tokenizer, before, self.hidden, asked.stops)


def _portions(asked: Sequence[Ending], most: int) -> Iterator[list[Ending]]:
    portion, total = list[Ending](), 0
    for one in asked:
        if portion and total + len(one.ids) > most:
            yield portion
            portion, total = [], 0
        portion.append(one)
        total += len(one.ids)
    if portion:
        yield portion


@contextmanager
def _progress(job: EvalJob) -> Iterator[Advance]:
    """A bar on rank 0's terminal, if it has one."""
    if dist.get_rank() != 0 or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    total = 0 if job.comparison is None else len(job.comparison.windows)
    for asked in job.questions:
        continued = asked.continuations
        total += len(asked.endings) + (0 if continued is None else len(continued.prompts))
    columns = ("questions", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
