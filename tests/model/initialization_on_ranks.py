"""Run on ranks: save the initial weights of a layout, compare them with one process's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import load_weights, save_weights
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan as plans


def build(experiment: Experiment) -> list[torch.nn.Module]:
    """This rank's chunks."""
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, seed=1, timeout_s=60)
    return build_chunks(experiment, plan, torch.float32)


def save(experiment: Experiment, folder: str) -> list[int]:
    """Save the initial weights. Returns the number of this rank's parameters, chunk by chunk."""
    chunks = build(experiment)
    save_weights(Path(folder), chunks)
    return [sum(parameter.numel() for parameter in chunk.parameters()) for chunk in chunks]


def differences(experiment: Experiment, folder: str) -> list[str]:
    """In one process: the parameters whose initial values are not those saved in `folder`."""
    chunks = build(experiment)
    drawn = {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}
    for parameter in chunks[0].parameters():
        parameter.data.fill_(7.0)
    load_weights(Path(folder), chunks)
    return [name for name, p in chunks[0].named_parameters() if not torch.equal(p.detach(), drawn[name])]


def weights(experiment: Experiment) -> dict[str, Tensor]:
    """In one process: the initial weights by name."""
    return {name: p.detach().clone() for name, p in build(experiment)[0].named_parameters()}


def embeddings_of_stages(experiment: Experiment) -> Tensor:
    """On two pipeline ranks: this one's copy of the tied embedding."""
    return build(experiment)[0].shared_embedding_or_output_weight().detach().clone()
