"""Loss of answers: how likely the model finds the texts that follow prompts."""

from __future__ import annotations

from megatron_moe.config.errors import InputError
from megatron_moe.inference.evaluation.asked import Asked
from megatron_moe.inference.evaluation.questions import Answers, Encoder, Questions
from megatron_moe.inference.evaluation.records import Expression, Record
from megatron_moe.inference.evaluation.result import Result
from megatron_moe.inference.evaluation.statistics import exponential, mean, ratio
from megatron_moe.inference.evaluation.task import LossOfAnswer, key_in


class AskedAnswers:
    """A task of this kind, its records read and checked."""

    def __init__(self, task: LossOfAnswer, encoder: Encoder, limit: int | None) -> None:
        self.task = task
        self._answer = Expression(key_in(task, "answer"), task.answer)
        self.asked = Asked(task, encoder, self._text, limit)
        self._texts = [self._text(record) for record in self.asked.records]
        self.questions = Questions(
            [
                encoder.ending(self.asked.prompt(record), text)
                for record, text in zip(self.asked.records, self._texts, strict=True)
            ]
        )
        self.notes = self.asked.notes

    def _text(self, record: Record) -> str:
        text = self._answer.string(record)
        if not text.strip():
            raise InputError(f"{record.place}: the answer ({self._answer.key}) is empty")
        return text

    def score(self, answers: Answers) -> Result:
        """`loss`: nats a token over all answers; `greedy`: share of answers each of whose tokens is the most
        likely one."""
        losses = [-answer.log_prob for answer in answers.endings]
        tokens = [float(len(ending.ids) - ending.start) for ending in self.questions.endings]
        loss = ratio(losses, tokens)
        metrics = {
            "loss": loss,
            "perplexity": exponential(loss),
            "loss_of_mean_answer": mean(losses),
            "greedy": mean([float(answer.is_greedy) for answer in answers.endings]),
        }
        records = [
            {
                "place": record.place,
                "prompt": self.asked.prompt(record).question,
                "answer": text,
                "loss": loss_of_it,
                "tokens": int(count),
                "is_greedy": answer.is_greedy,
            }
            for record, text, loss_of_it, count, answer in zip(
                self.asked.records, self._texts, losses, tokens, answers.endings, strict=True
            )
        ]
        return Result(self.task.name, self.task.kind, len(records), metrics, self.notes, records)
