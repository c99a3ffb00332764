"""Exact match: whether what the model generates is the answer."""

from __future__ import annotations

import re
import string
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.inference.evaluation.asked import Asked
from megatron_moe.inference.evaluation.questions import Answers, Continuations, Encoder, Questions
from megatron_moe.inference.evaluation.records import Expression, Record
from megatron_moe.inference.evaluation.result import Result
from megatron_moe.inference.evaluation.statistics import mean
from megatron_moe.inference.evaluation.task import ExactMatch, key_in

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AskedMatches:
    """A task of this kind, its records read and checked."""

    def __init__(self, task: ExactMatch, encoder: Encoder, limit: int | None) -> None:
        self.task = task
        self._answer = Expression(key_in(task, "answer"), task.answer)
        self.asked = Asked(task, encoder, lambda record: self._right(record)[0], limit)
        self._answers = [self._right(record) for record in self.asked.records]
        room = task.max_new_tokens
        prompts = [encoder.prompt(self.asked.prompt(record), room) for record in self.asked.records]
        stops = list(task.stop)
        self.questions = Questions(continuations=Continuations(prompts, stops, task.max_new_tokens))
        self.notes = self.asked.notes

    def score(self, answers: Answers) -> Result:
        """`exact_match`: share of records; `extracted`: share where the expression found something."""
        found = [extracted(self.task, text) for text in answers.texts]
        right = [
            text is not None and normal(self.task, text) in {normal(self.task, one) for one in wanted}
            for text, wanted in zip(found, self._answers, strict=True)
        ]
        metrics = {"exact_match": mean([float(one) for one in right])}
        if self.task.extract is not None:
            metrics["extracted"] = mean([float(text is not None) for text in found])
        records = [
            {
                "place": record.place,
                "prompt": self.asked.prompt(record).question,
                "answer": wanted,
                "text": text,
                "extracted": part,
                "exact_match": one,
            }
            for record, wanted, text, part, one in zip(
                self.asked.records, self._answers, answers.texts, found, right, strict=True
            )
        ]
        return Result(self.task.name, self.task.kind, len(records), metrics, self.notes, records)

    def _right(self, record: Record) -> list[str]:
        given: Any = self._answer.value(record)
        answers = given if isinstance(given, list) else [self._answer.string(record)]
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise InputError(
                f"{record.place}: the answer ({self._answer.key}) must be a text, or a list of texts"
            )
        return answers


def extracted(task: ExactMatch, text: str) -> str | None:
    """What counts of a generated text; None where the regular expression finds nothing."""
    if task.extract is None:
        return text
    matches = list(re.finditer(task.extract, text, re.DOTALL))
    if not matches:
        return None
    match = matches[0 if task.extract_from == "first" else -1]
    return next((group for group in match.groups() if group is not None), match[0])


def normal(task: ExactMatch, text: str) -> str:
    """A text without what does not matter; blanks around it never do."""
    for pattern in task.ignore:
        text = re.sub(pattern, "", text)
    if task.ignore_case:
        text = text.lower()
    if task.ignore_punctuation:
        text = text.translate(_NO_PUNCTUATION)
    return text.strip()
