"""Run on ranks: a model filled from a path, written again by Megatron-Core."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.loading import fill
from megatron_moe.convert.models import open_model
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import load_weights, save_weights
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan as plans


def fill_and_save(experiment: Experiment, path: str, out: str) -> None:
    """Fill this layout's model from any path, and save its weights to `out`, which must be there."""
    chunks = _build(experiment)
    fill(chunks, open_model(path).weights)
    save_weights(Path(out), chunks)


def load_and_save(experiment: Experiment, path: str, out: str) -> None:
    """The same by Megatron-Core's own way of loading a checkpoint."""
    chunks = _build(experiment)
    load_weights(Path(path), chunks)
    save_weights(Path(out), chunks)


def _build(experiment: Experiment) -> list[torch.nn.Module]:
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, experiment.training.seed, timeout_s=60)
    chunks = build_chunks(experiment, plan, torch.float32)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    return chunks
