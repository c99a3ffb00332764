"""Programs that the model writes, held against their tests in a sandbox."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.inference import sandbox
from megatron_moe.inference.evaluation.asked import Asked
from megatron_moe.inference.evaluation.questions import Answers, Continuations, Encoder, Questions
from megatron_moe.inference.evaluation.records import Expression, Record
from megatron_moe.inference.evaluation.result import Result
from megatron_moe.inference.evaluation.statistics import mean, pass_at_k
from megatron_moe.inference.evaluation.task import Programs, key_in


class AskedPrograms:
    """A task of this kind, its records read and checked.

    Args:
        seed: of the draws.
    """

    def __init__(self, task: Programs, encoder: Encoder, limit: int | None, seed: int) -> None:
        self.task, self.is_chat = task, encoder.chat is not None
        key = f"{task.name}: samples (--samples)"
        if max(task.k) > task.samples:
            raise InputError(f"{key}: {task.samples} are too few for pass@{max(task.k)}; take that many")
        if task.samples > 1 and task.temperature == 0:
            raise InputError(
                f"{key}: {task.samples} would all be the same at temperature 0; set temperature "
                "(--temperature), for example to 0.8"
            )
        if task.top_p < 1 and task.temperature == 0:
            raise InputError(
                f"{task.name}: top_p (--top-p) chooses among what is drawn, and at temperature 0 nothing is: "
                "set temperature (--temperature), for example to 0.8"
            )
        sandbox.run("pass", sandbox.Limits())  # where nothing can be isolated, nothing is generated either
        self._program = Expression(key_in(task, "program"), task.program)
        self._in_chat = Expression(key_in(task, "program_in_chat"), task.program_in_chat)
        shown = Expression(key_in(task, "answer"), task.answer)
        self.asked = Asked(task, encoder, shown.string, limit)
        for record in self.asked.records:  # every key is there
            self._whole(record, "")
        prompts = [
            encoder.prompt(self.asked.prompt(record), task.max_new_tokens)
            for record in self.asked.records
            for _ in range(task.samples)
        ]
        stops = [] if self.is_chat else list(task.stop)
        self.questions = Questions(
            continuations=Continuations(
                prompts, stops, task.max_new_tokens, task.temperature, task.top_p, seed
            )
        )
        self.notes = self.asked.notes

    def score(self, answers: Answers) -> Result:
        """Run all programs, and estimate `pass@k`."""
        task, count = self.task, self.task.samples
        owners = [record for record in self.asked.records for _ in range(count)]
        programs = [self._whole(record, text) for record, text in zip(owners, answers.texts, strict=True)]
        limits = sandbox.Limits(wall_s=task.timeout_s, cpu_s=max(1, round(task.timeout_s)))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            outcomes = list(pool.map(lambda program: sandbox.run(program, limits), programs))
        passed = [
            sum(outcome.passed for outcome in outcomes[first : first + count])
            for first in range(0, len(outcomes), count)
        ]
        metrics = {f"pass@{k}": mean([pass_at_k(count, right, k) for right in passed]) for k in task.k}
        records: list[dict[str, Any]] = [
            {
                "place": record.place,
                "text": text,
                "program": program,
                "passed": outcome.passed,
                "reason": outcome.reason,
            }
            for record, text, program, outcome in zip(owners, answers.texts, programs, outcomes, strict=True)
        ]
        return Result(task.name, task.kind, len(passed), metrics, self.notes, records)

    def _whole(self, record: Record, text: str) -> str:
        if self.is_chat and (found := re.search(self.task.extract, text, re.DOTALL)) is not None:
            part = next((group for group in found.groups() if group is not None), found[0])
            return self._in_chat.string(record, completion=part)
        return self._program.string(record, completion=text)
