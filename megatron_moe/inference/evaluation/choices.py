"""Multiple choice: which answer the model finds most likely."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from itertools import count
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.inference.evaluation.asked import Asked
from megatron_moe.inference.evaluation.questions import Answers, Encoder, Questions
from megatron_moe.inference.evaluation.records import Expression, Record
from megatron_moe.inference.evaluation.result import Result
from megatron_moe.inference.evaluation.statistics import mean
from megatron_moe.inference.evaluation.task import MultipleChoice, key_in


class AskedChoices:
    """A task of this kind, its records read and checked."""

    def __init__(self, task: MultipleChoice, encoder: Encoder, limit: int | None) -> None:
        self.task = task
        self._choices = _choices_of(task)
        self._answer = Expression(key_in(task, "answer"), task.answer)
        self._labels = None if task.labels is None else Expression(key_in(task, "labels"), task.labels)
        self.asked = Asked(task, encoder, self._shown, limit)
        self._choices_of = [self._texts(record) for record in self.asked.records]
        self._right = [self._right_of(record) for record in self.asked.records]
        endings = [
            encoder.ending(self.asked.prompt(record), choice)
            for record, choices in zip(self.asked.records, self._choices_of, strict=True)
            for choice in choices
        ]
        self.questions = Questions(endings)
        self.notes = self.asked.notes

    def score(self, answers: Answers) -> Result:
        """`acc`: the likeliest choice; `acc_norm`: a character of it, as lm-evaluation-harness; `acc_bytes`:
        a byte; `acc_tokens`: a token."""
        numbers = count()
        scores: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": [], "acc_tokens": []}
        likelihoods, records = list[float](), []
        for record, choices, right in zip(self.asked.records, self._choices_of, self._right, strict=True):
            mine = [next(numbers) for _ in choices]
            logs = [answers.endings[number].log_prob for number in mine]
            tokens = [len(ending.ids) - ending.start for ending in (self.questions.endings[n] for n in mine)]
            sizes: dict[str, list[int]] = {
                "acc": [1] * len(choices),
                "acc_norm": [len(choice) for choice in choices],
                "acc_bytes": [len(choice.encode()) for choice in choices],
                "acc_tokens": tokens,
            }
            chosen = {name: _best(logs, of_each) for name, of_each in sizes.items()}
            for name, choice in chosen.items():
                scores[name].append(float(choice == right))
            likelihoods.append(logs[right] - _log_sum(logs))
            found: dict[str, Any] = {
                "place": record.place,
                "prompt": self.asked.prompt(record).question,
                "choices": choices,
                "answer": right,
                "log_likelihoods": logs,
            }
            records.append(found | {f"chosen_{name}": choice for name, choice in chosen.items()})
        metrics = {name: mean(values) for name, values in scores.items()}
        metrics["log_prob_of_answer"] = mean(likelihoods)
        return Result(self.task.name, self.task.kind, len(records), metrics, self.notes, records)

    def _texts(self, record: Record) -> list[str]:
        key = key_in(self.task, "choices")
        if isinstance(self._choices, list):
            found: Any = [choice.string(record) for choice in self._choices]
        else:
            found = self._choices.value(record)
        if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
            raise InputError(f"{record.place}: {key} names something else than a list of texts")
        if len(found) < 2 or "" in found:
            what = "a choice without text" if "" in found else f"{len(found)} choices; at least 2 are needed"
            raise InputError(f"{record.place}: has {what} ({key})")
        return found

    def _right_of(self, record: Record) -> int:
        """The number of the right choice."""
        choices, given = self._texts(record), self._answer.value(record)
        labels = self._labels_of(record, len(choices))
        if labels is not None:
            if str(given) in labels:
                return labels.index(str(given))
            allowed = f"one of its labels {', '.join(labels)}"
        else:
            number = _number(given, choices)
            if number is not None and 0 <= number < len(choices):
                return number
            allowed = f"a number from 0 to {len(choices) - 1}, a letter, or the text of a choice"
        raise InputError(
            f"{record.place}: the answer {given!r} ({key_in(self.task, 'answer')}) is none of its "
            f"{len(choices)} choices: it must be {allowed}"
        )

    def _labels_of(self, record: Record, choices: int) -> list[str] | None:
        if self._labels is None:
            return None
        found = self._labels.value(record)
        if not isinstance(found, list) or len(found) != choices:
            raise InputError(f"{record.place}: '{self.task.labels}' is no list of {choices} labels")
        return [str(label) for label in found]

    def _shown(self, record: Record) -> str:
        return self._texts(record)[self._right_of(record)]


def _choices_of(task: MultipleChoice) -> Expression | list[Expression]:
    key = key_in(task, "choices")
    if isinstance(task.choices, str):
        if "{{" in task.choices:
            raise InputError(f"{key}: must name a key that holds a list, or be a list of templates")
        return Expression(key, task.choices)
    if len(task.choices) < 2:
        raise InputError(f"{key}: has {len(task.choices)} choices; give it at least 2")
    return [Expression(key, choice) for choice in task.choices]


def _number(given: Any, choices: Sequence[str]) -> int | None:
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if not isinstance(given, str):
        return None
    if given in choices:
        return choices.index(given)
    if given.strip().isdecimal():
        return int(given)
    letter = given.strip().upper()
    return string.ascii_uppercase.index(letter) if letter and letter in string.ascii_uppercase[:26] else None


def _best(logs: Sequence[float], sizes: Sequence[int]) -> int:
    """The first of the best ones."""
    scores = [log / max(size, 1) for log, size in zip(logs, sizes, strict=True)]
    return scores.index(max(scores))


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(math.fsum(math.exp(log - most) for log in logs))
