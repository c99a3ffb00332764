"""What `generate` was asked for, as its ranks read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_moe.inference.prompts import Prompt
from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.settings import Settings

DType = Literal["auto", "fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class Job:
    """A generation.

    Attributes:
        model: path of the model.
        overrides: its layout.
        dtype: of weights and products; `auto`: what the device is fast in; `fp8`: of linear layers and
            experts in memory, products as `auto`.
        logit_error: say what FP8 does to the logits of the prompts.
        prompts: to be continued.
        settings: how.
        stops: texts at which a continuation ends.
        hidden: ids that stand for no text.
        output: file that takes a JSON object a prompt; None: none does.
        as_json: so does standard output, instead of the text.
    """

    model: str
    overrides: Sequence[str]
    dtype: DType
    logit_error: bool
    prompts: Sequence[Prompt]
    settings: Settings
    stops: Sequence[str]
    hidden: Sequence[int]
    output: str | None
    as_json: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        record = json.loads(text)
        settings = record["settings"]
        return cls(
            **record
            | {
                "prompts": [Prompt(**prompt) for prompt in record["prompts"]],
                "settings": Settings(**settings | {"sampling": Sampling(**settings["sampling"])}),
            }
        )
