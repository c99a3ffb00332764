"""Tasks and texts, read and turned into questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_moe.config.errors import InputError
from megatron_moe.config.text_files import expand
from megatron_moe.inference.evaluation.answers import AskedAnswers
from megatron_moe.inference.evaluation.choices import AskedChoices
from megatron_moe.inference.evaluation.matches import AskedMatches
from megatron_moe.inference.evaluation.programs import AskedPrograms
from megatron_moe.inference.evaluation.questions import Answers, Encoder, Questions
from megatron_moe.inference.evaluation.result import Result
from megatron_moe.inference.evaluation.task import (
    ExactMatch,
    LossOfAnswer,
    MultipleChoice,
    Programs,
    Task,
    read_task,
)
from megatron_moe.inference.evaluation.texts import AskedText


class Scored(Protocol):
    """A task or a text whose questions can be asked, and whose answers can be scored."""

    questions: Questions

    def score(self, answers: Answers) -> Result: ...


@dataclass(frozen=True)
class Choices:
    """What the command line says about all tasks; None: what each of them says."""

    limit: int | None = None
    samples: int | None = None
    k: list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


def read_tasks(paths: Sequence[Path], given: Choices) -> list[Task]:
    """The tasks in files. Raises InputError with what is wrong with any of them."""
    problems, tasks = [], []
    changed = {name: getattr(given, name) for name in ("samples", "k", "temperature", "top_p")}
    changes = {name: value for name, value in changed.items() if value is not None}
    for path in paths:
        try:
            task = read_task(path)
        except InputError as error:
            problems += error.problems
            continue
        tasks.append(task.model_copy(update=changes) if isinstance(task, Programs) else task)
    if problems:
        raise InputError(*problems)
    if changes and not any(isinstance(task, Programs) for task in tasks):
        raise InputError(f"--{next(iter(changes)).replace('_', '-')}: is of tasks of the kind programs only")
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two tasks are called {min(twice)}: give one of them another name")
    return tasks


def asked_of(task: Task, encoder: Encoder, given: Choices) -> Scored:
    """The questions of a task. Raises InputError for what its records lack."""
    if isinstance(task, MultipleChoice):
        return AskedChoices(task, encoder, given.limit)
    if isinstance(task, ExactMatch):
        return AskedMatches(task, encoder, given.limit)
    if isinstance(task, LossOfAnswer):
        return AskedAnswers(task, encoder, given.limit)
    assert isinstance(task, Programs)
    return AskedPrograms(task, encoder, given.limit, given.seed)


def all_asked(
    tasks: Sequence[Task],
    texts: Sequence[str],
    encoder: Callable[[], Any],
    given: Choices,
    json_key: str,
    length: int,
    stride: int,
) -> list[Scored]:
    """Everything that is asked.

    Args:
        encoder: makes one, which counts for itself.
        length, stride: of the windows of texts.
    """
    files = {name: expand([name]) for name in texts}
    asked: list[Scored] = [
        AskedText(name, found, json_key, encoder(), length, stride, given.limit)
        for name, found in files.items()
    ]
    return asked + [asked_of(task, encoder(), given) for task in tasks]
