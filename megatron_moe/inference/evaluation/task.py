"""Tasks: YAML files that say what is asked of a model, and how its answers are scored."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

from pydantic import Field, ValidationError

from megatron_moe.config.errors import InputError
from megatron_moe.config.origin import KeyPath, shown
from megatron_moe.config.schema.section import Section
from megatron_moe.config.wording import expected, remedy
from megatron_moe.config.yaml_tree import Tree, parse
from megatron_moe.inference.evaluation.records import Expression

Count: TypeAlias = Annotated[int, Field(ge=0)]
PositiveCount: TypeAlias = Annotated[int, Field(ge=1)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]


class Task(Section):
    """What all kinds have. `prompt`, `answer` and the like are the name of a key of a record, with dots where
    it lies in another (`choices.text`), or, with `{{`, a jinja template over its keys."""

    name: str = ""
    """Of the report; the file's own name where it is left out."""
    file: Text
    """Records: a .jsonl file, also with .gz or .zst behind it. A path that is not absolute begins at the
    folder of the task."""
    prompt: Text
    """What the model is given of a record."""
    description: str = ""
    """What stands before everything; with --chat it is the system's message."""
    few_shot: Count = 0
    """Records that are shown with their answers before each question: the first ones of few_shot_file."""
    few_shot_file: str | None = None
    """Where they are taken from. Left out: from `file`, and these are not asked then."""
    few_shot_answer: str | None = None
    """What is shown as their answer; left out: the answer itself."""
    separator: str = " "
    """Between a prompt and its answer. With --chat there is none."""
    example_separator: str = "\n\n"
    """Behind each shown answer, and behind the description. With --chat there is none."""


class MultipleChoice(Task):
    """Which of some answers the model finds most likely."""

    kind: Literal["multiple_choice"]
    choices: str | list[str]
    """A key with a list of texts, or a list of templates."""
    answer: str
    """The right one: its number from 0, its letter, its label or its text."""
    labels: str | None = None
    """A key with a list of the choices' names, which `answer` is one of."""


class ExactMatch(Task):
    """Whether what the model generates is the answer."""

    kind: Literal["exact_match"]
    answer: str
    """The answer, or a key with a list of answers each of which is right."""
    max_new_tokens: PositiveCount = 256
    """Of the generated text, which is what is most likely."""
    stop: list[Text] = Field(default_factory=list)
    """Texts before which it ends."""
    extract: str | None = None
    """A regular expression of what counts in the text: its first group that matched, or all of it."""
    extract_from: Literal["first", "last"] = "last"
    """Which of several matches counts."""
    ignore: list[str] = Field(default_factory=list)
    """Regular expressions of what is taken out of text and answer before they are compared."""
    ignore_case: bool = False
    """Whether capital letters are small ones."""
    ignore_punctuation: bool = False
    """Whether punctuation is taken out."""


class LossOfAnswer(Task):
    """How likely the model finds the answers."""

    kind: Literal["loss_of_answer"]
    answer: str
    """The text whose likelihood is asked for."""


class Programs(Task):
    """Whether programs that the model writes pass their tests."""

    kind: Literal["programs"]
    program: str = "{{ prompt }}{{ completion }}\n{{ test }}\ncheck({{ entry_point }})"
    """What is run: a template over the record's keys and `completion`, what the model wrote."""
    answer: str = "canonical_solution"
    """What is shown of few-shot records."""
    stop: list[Text] = Field(default_factory=lambda: ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"])
    """Texts before which a program ends; not with --chat."""
    extract: str = r"\A((?:from |import |def |class |@|[ \t]).*?)(?:\n```|\Z)|```[^\n]*\n(.*?)(?:\n```|\Z)"
    """With --chat: a regular expression of the program in an answer, the first group that matched: an answer
    that begins as a program, or its first block of code."""
    program_in_chat: str = "{{ prompt }}\n\n{{ completion }}\n{{ test }}\ncheck({{ entry_point }})"
    """With --chat: what is run, where the program was found in the answer."""
    max_new_tokens: PositiveCount = 512
    """Of each program."""
    samples: PositiveCount = 1
    """Programs a record."""
    k: list[PositiveCount] = Field(default_factory=lambda: [1])
    """pass@k is the probability that one of k programs passes."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Draw tokens, by logits over this; 0 takes the most likely one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the most likely ones with this probability together."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """A program that takes longer fails."""


KINDS: dict[str, type[Task]] = {
    "multiple_choice": MultipleChoice,
    "exact_match": ExactMatch,
    "loss_of_answer": LossOfAnswer,
    "programs": Programs,
}
_PATTERNS = ("extract", "ignore")
_EXPRESSIONS = ("prompt", "answer", "choices", "labels", "few_shot_answer", "program", "program_in_chat")


def read_task(path: Path) -> Task:
    """The task in a file, its paths made whole. Raises InputError with all that is wrong with it."""
    try:
        tree = parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: the task cannot be read: {reason}") from None
    if tree.problems:
        raise InputError(*tree.problems)
    kind = tree.values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(_no_kind(path, tree, kind))
    try:
        task = KINDS[kind].model_validate(tree.values)
    except ValidationError as error:
        raise InputError(*_problems(path, tree, KINDS[kind], error)) from None
    if problems := _wrong_texts(path, tree, task):
        raise InputError(*problems)
    here = path.parent
    return task.model_copy(
        update={
            "name": task.name or path.stem,
            "file": str(here / task.file),
            "few_shot_file": None if task.few_shot_file is None else str(here / task.few_shot_file),
        }
    )


def _no_kind(path: Path, tree: Tree, kind: Any) -> str:
    known = ", ".join(KINDS)
    if "kind" not in tree.values:
        return f"{path}: kind: is missing; give it one of {known}"
    close = difflib.get_close_matches(str(kind), KINDS, n=1)
    meant = f"did you mean {close[0]}?" if close else f"kinds are {known}"
    return f"{_place(path, tree, ('kind',))}kind: {shown(kind)} is not known; {meant}"


def _problems(path: Path, tree: Tree, kind: type[Task], error: ValidationError) -> list[str]:
    types, lines = get_type_hints(kind, include_extras=True), {}
    for finding in error.errors(include_url=False, include_input=False):
        name = str(finding["loc"][0])
        place = _place(path, tree, finding["loc"])
        if finding["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, kind.model_fields, n=1)
            advice = f"did you mean {close[0]}?" if close else f"keys are {', '.join(kind.model_fields)}"
            lines[name] = f"{place}{name}: unknown key; {advice}"
        elif finding["type"] == "missing":
            lines[name] = f"{path}: {name}: is missing; give it {expected(types[name])}"
        else:
            value = tree.values[name]
            field = kind.model_fields[name]
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            advice = remedy(types[name], value, default or None)
            lines[name] = f"{place}{name}: must be {expected(types[name])} ({shown(value)}); {advice}"
    return list(lines.values())


def _wrong_texts(path: Path, tree: Tree, task: Task) -> list[str]:
    """Regular expressions and templates that are none."""
    found = []
    for name in type(task).model_fields:
        given = getattr(task, name)
        where = f"{_place(path, tree, (name,))}{name}"
        for text in given if isinstance(given, list) else [given]:
            if name in _PATTERNS and text is not None:
                try:
                    re.compile(text)
                except re.error as error:
                    found.append(f"{where}: {shown(text)} is no regular expression: {error}; correct it")
            elif name in _EXPRESSIONS and text is not None:
                try:
                    Expression(where, text)
                except InputError as error:
                    found += error.problems
    return found


def _place(path: Path, tree: Tree, location: KeyPath) -> str:
    for length in range(len(location), 0, -1):
        if (origin := tree.origins.get(location[:length])) is not None:
            return origin.prefix()
    return f"{path}: "


def key_in(task: Task, name: str) -> str:
    """How errors call a key of a task."""
    return f"{task.name}.{name}"
