"""What all kinds of tasks share: their records, and the prompt of each with the examples before it."""

from __future__ import annotations

from collections.abc import Callable

from megatron_moe.config.errors import InputError
from megatron_moe.inference.evaluation.questions import Encoder, Prompt
from megatron_moe.inference.evaluation.records import Expression, Record, read_records
from megatron_moe.inference.evaluation.task import Task, key_in

ShownAnswer = Callable[[Record], str]


class Asked:
    """The records that a task asks about.

    Args:
        shown: the answer of a record, as examples show it unless `few_shot_answer` says something else.
        limit: at most so many records.

    Raises InputError for a file without records, or with too few.
    """

    def __init__(self, task: Task, encoder: Encoder, shown: ShownAnswer, limit: int | None) -> None:
        self.task, self.encoder = task, encoder
        self._question = Expression(key_in(task, "prompt"), task.prompt)
        if task.few_shot_answer is not None:
            shown = Expression(key_in(task, "few_shot_answer"), task.few_shot_answer).string
        count = task.few_shot
        first = count if task.few_shot_file is None else 0
        records = read_records(task.file, None if limit is None else limit + first)
        examples = records[:first] if task.few_shot_file is None else []
        if count and task.few_shot_file is not None:
            examples = read_records(task.few_shot_file, count)
        if len(examples) < count:
            raise InputError(
                f"{key_in(task, 'few_shot')}: {count} examples, but {task.few_shot_file or task.file} has "
                f"{len(examples)} records; ask for at most so many"
            )
        self.records = records[first:]
        if not self.records:
            raise InputError(
                f"{task.file}: all of its {len(records)} records are examples (few_shot: {count}), so that "
                "none is left to ask; name few_shot_file"
            )
        self._examples = [(self._question.string(record), shown(record)) for record in examples]

    def prompt(self, record: Record) -> Prompt:
        task = self.task
        question = self._question.string(record)
        return Prompt(task.description, self._examples, question, task.separator, task.example_separator)

    @property
    def notes(self) -> list[str]:
        """What was asked in another way than the task says."""
        cut = self.encoder.cut
        if not cut:
            return []
        return [
            f"{cut} prompts were longer than {self.encoder.length} tokens: their beginnings were left out"
        ]
