"""Run on ranks: what evaluation reports of each source, and what a microbatch looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_on_ranks import begin

from megatron_moe.config.schema import Experiment
from megatron_moe.data.blend import Blend
from megatron_moe.engine import schedule
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.training.callback import Record


def evaluated(experiment: Experiment, run: Path) -> Record:
    """What `evaluate` reports of the first weights."""
    trainer = begin(experiment, run)
    assert trainer.datasets.valid is not None
    return trainer.evaluate(trainer.datasets.valid, experiment.training.eval_iters)


def evaluated_by_hand(experiment: Experiment, run: Path) -> dict[str, float]:
    """Mean of -log softmax(logits)[label] in float64 over all targets, and over those of each source. For one
    process."""
    trainer = begin(experiment, run)
    blend, training = trainer.datasets.valid, experiment.training
    assert isinstance(blend, Blend)
    model, order = unwrap(trainer.chunks[0]).eval(), blend.order(training.seed, shuffle=False)
    losses: dict[str, list[Tensor]] = {part.name: [] for part in blend.parts}
    with torch.no_grad():
        for number in range(training.eval_iters * training.global_batch_size):
            sample = blend[order[number]]
            logits = model(sample["tokens"][None], sample["position_ids"][None], None)[0]
            chances = logits.double().log_softmax(-1)
            loss = -chances.gather(-1, sample["labels"][:, None]).flatten()
            name = blend.parts[int(sample["by_source"].argmax())].name
            losses[name].append(loss[sample["loss_mask"] > 0])
    everything = torch.cat([loss for of_source in losses.values() for loss in of_source])
    of_sources = {f"eval/loss/{name}": float(torch.cat(found).mean()) for name, found in losses.items()}
    return {"eval/loss": float(everything.mean()), **of_sources}


def epochs(experiment: Experiment, run: Path, steps: int) -> tuple[int, list[float]]:
    """Samples of the training part, and what each of the first steps says of epochs."""
    trainer = begin(experiment, run)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    return len(trainer.datasets.train), [trainer.step(batches)["epoch"] for _ in range(steps)]


def shared(experiment: Experiment, run: Path, masks: list[dict[str, Tensor]]) -> list[set[str]]:
    """The keys of microbatches that come with these masks."""
    begin(experiment, run)
    tokens: dict[str, Any] = {"tokens": torch.zeros(1, 4, dtype=torch.int64)}
    return [set(schedule.share_of_context({**tokens, **mask}, torch.device("cpu"))) for mask in masks]
