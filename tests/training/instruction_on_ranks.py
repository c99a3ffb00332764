"""Run on ranks: finetuning against each record alone in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from instruction_cases import RECORDS
from torch import Tensor
from train_on_ranks import begin

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import gradients, groups
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.training import trainer as trainer_module

EOD = 256


def against_records_alone(
    experiment: Experiment, folder: Path, evaluated: range
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Over one step whose batch is all records but those of `evaluated`, once each: the relative difference
    of each weight's gradient, and by metric the numbers found and expected."""
    trainer = begin(experiment, folder)
    assert trainer.datasets.valid is not None
    found: dict[str, Tensor] = {}

    def look() -> None:
        for name, weight in unwrap(trainer.chunks[0]).named_parameters():
            found[name] = weight.main_grad.double().clone()  # type: ignore[attr-defined]

    held_out = trainer.evaluate(trainer.datasets.valid, 1)
    assert len(trainer.datasets.train) == experiment.training.global_batch_size
    with gradients.watched(trainer.chunks, look):
        record = trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    groups.destroy()

    model = unwrap(begin(experiment, folder).chunks[0]).double()
    trained = [losses for n, losses in _alone(model) if n not in evaluated]
    tokens, samples = torch.cat(trained).mean(), torch.stack([losses.mean() for losses in trained]).mean()
    assert experiment.data.instruction is not None
    objective = samples if experiment.data.instruction.weighting == "sample" else tokens
    names, weights = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(objective, weights), strict=True))
    with torch.no_grad():
        kept = [losses for n, losses in _alone(model.eval()) if n in evaluated]
    metrics = {
        "loss": (record["loss"], float(tokens)),
        "sample_loss": (record["sample_loss"], float(samples)),
        "eval/loss": (held_out["eval/loss"], float(torch.cat(kept).mean())),
        "eval/sample_loss": (held_out["eval/sample_loss"], sum(float(x.mean()) for x in kept) / len(kept)),
        "data/targets": (record["data/targets"], sum(map(len, trained))),
    }
    return {name: _apart(found[name], gradient) for name, gradient in expected.items()}, metrics


def _alone(model: Any) -> Any:
    """The losses of each record's targets, nothing beside it in its sequence."""
    for number, (prompt, answer) in enumerate(RECORDS):
        before = f"### User:\n{prompt}\n\n### Assistant:\n".encode()
        ids = torch.tensor([[*before, *answer.encode(), EOD]])
        logits = model(ids[:, :-1], torch.arange(ids.size(1) - 1)[None], None)
        losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, len(before) - 1 :, 0]
        yield number, losses


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def routed(experiment: Experiment, folder: Path) -> tuple[float, list[float], dict[str, Any]]:
    """Targets of the first step, assignments of each layer, and the record."""
    trainer = begin(experiment, folder)
    seen = []

    def reduced(*arguments: Any) -> Any:
        seen.append(reduce(*arguments))
        return seen[-1]

    reduce = trainer_module.reduce_step
    with mock.patch.object(trainer_module, "reduce_step", reduced):
        record = trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    return seen[0].targets, seen[0].moe.load.sum(1).tolist(), record
