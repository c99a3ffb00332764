"""What the tests of trained weights look at in a model that Megatron-Core builds."""

from __future__ import annotations

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.engine.parameter_names import checkpoint_names
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan


def names_and_sizes(experiment: Experiment) -> tuple[list[str], int]:
    """The checkpoint's names of this rank's parameters, and how many numbers they have."""
    its_plan = plan.make(experiment)
    groups.initialize_model_parallel(its_plan.layout, 1234, 60, its_plan.rank_of_embedding_copy)
    chunks = build_chunks(experiment, its_plan, torch.float32)
    names = [name for chunk in chunks for name in checkpoint_names(chunk).values()]
    return names, sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
