"""Run on a rank: what a model in a folder answers, and how the bridge to lm-evaluation-harness asks it."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch

from megatron_moe.convert.models import open_model
from megatron_moe.engine import device as devices
from megatron_moe.inference.building import build
from megatron_moe.inference.evaluation.command import Answering
from megatron_moe.inference.evaluation.questions import Answers, Questions
from megatron_moe.inference.generation import Generator
from megatron_moe.inference.layout import inference_experiment
from megatron_moe.inference.precision import logits_of
from megatron_moe.inference.prompts import ends_of, hidden_of, tokenizer_of


def answers(folder: Path, layout: list[str], asked: list[Questions]) -> list[Answers]:
    model = open_model(folder)
    tokenizer = tokenizer_of(model)
    ends = ends_of(model, tokenizer)
    generator = _generator(folder, layout)
    answering = Answering(generator, tokenizer, ends, hidden_of(tokenizer, ends), 3, is_chat=False)
    return [answering.answers(questions) for questions in asked]


def logits(folder: Path, layout: list[str], ids: list[int]) -> torch.Tensor:
    return logits_of(_generator(folder, layout).network, [ids])[0]


def of_bridge(
    folder: Path, layout: list[str], pairs: list[tuple[str, str]], texts: list[str], prompts: list[Any]
) -> Any:
    """What lm-evaluation-harness is told, by a stand-in for its class."""
    stand_in = types.ModuleType("lm_eval.api.model")
    stand_in.LM = type("LM", (), {"__init__": lambda self: None})  # type: ignore[attr-defined]
    sys.modules |= {"lm_eval": types.ModuleType("lm_eval"), "lm_eval.api": types.ModuleType("lm_eval.api")}
    sys.modules["lm_eval.api.model"] = stand_in
    from megatron_moe.inference.evaluation.harness import HarnessModel

    model = HarnessModel(folder, layout, dtype="fp32")
    return (
        model.loglikelihood([_request(pair) for pair in pairs]),
        model.loglikelihood_rolling([_request((text,)) for text in texts]),
        model.generate_until([_request(prompt) for prompt in prompts]),
        model.apply_chat_template([{"role": "user", "content": "Hi"}]),
    )


def _request(arguments: Any) -> Any:
    return types.SimpleNamespace(args=tuple(arguments))


def _generator(folder: Path, layout: list[str]) -> Generator:
    model = open_model(folder)
    experiment = inference_experiment(model.experiment, layout)
    return build(experiment, model.weights, devices.start(0), torch.float32)
