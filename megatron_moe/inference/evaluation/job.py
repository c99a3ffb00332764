"""What `eval` asks of its ranks, as they read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_moe.inference.evaluation.questions import Questions
from megatron_moe.inference.job import DType


@dataclass(frozen=True)
class Comparison:
    """A model of transformers that ours is held against.

    Attributes:
        folder: where it lies.
        windows: [w] lists of ids, of text, for the logits.
        prompts: [p] lists of ids, to be continued by both.
        new_tokens: of each of them.
    """

    folder: str
    windows: list[list[int]]
    prompts: list[list[int]]
    new_tokens: int


@dataclass(frozen=True)
class EvalJob:
    """An evaluation.

    Attributes:
        model: path of the model.
        overrides: its layout.
        dtype: of weights and products; `auto`: what the device is fast in.
        batch: continuations at once.
        is_chat: continuations are answers, and not parts of their prompts' texts.
        questions: of each task and text.
        found: file that takes the answers.
    """

    model: str
    overrides: Sequence[str]
    dtype: DType
    batch: int
    is_chat: bool
    questions: Sequence[Questions]
    comparison: Comparison | None
    found: str

    def to_json(self) -> str:
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        compared = None if self.comparison is None else asdict(self.comparison)
        return json.dumps(
            record | {"questions": [asked.to_json() for asked in self.questions], "comparison": compared}
        )

    @classmethod
    def from_json(cls, text: str) -> EvalJob:
        """What `to_json` wrote."""
        record = json.loads(text)
        questions = [Questions.from_json(asked) for asked in record["questions"]]
        compared = record["comparison"]
        comparison = None if compared is None else Comparison(**compared)
        return cls(**record | {"questions": questions, "comparison": comparison})
