"""Run on ranks: the distributed optimizer as it is built for a model."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.engine.adam import FusedAdam
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.engine.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan as plans


def built(experiment: Experiment) -> tuple[Any, Any, list[torch.nn.Module]]:
    """Optimizer, schedule and wrapped chunks of this rank."""
    from megatron.core.utils import get_model_config

    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, seed=1, timeout_s=60)
    chunks = build_chunks(experiment, plan, torch.float32)
    wrapped = wrap_data_parallel(get_model_config(chunks[0]), chunks, experiment.parallel)
    optimizer = build_optimizer(experiment, wrapped, torch.float32)
    return optimizer, build_scheduler(experiment, optimizer), wrapped


def decay_by_name(experiment: Experiment) -> dict[str, float]:
    """In one process: the weight decay that each parameter's step applies, after the schedule has set it."""
    optimizer, scheduler, chunks = built(experiment)
    scheduler.step(1)
    names = {parameter: name for name, parameter in unwrap(chunks[0]).named_parameters()}
    decays = {}
    for part in optimizer.chained_optimizers:
        assert type(part.optimizer) is FusedAdam
        for members, group in zip(part.model_float16_groups, part.optimizer.param_groups, strict=True):
            decays.update({names[parameter]: group["weight_decay"] for parameter in members})
        for members, group in zip(part.model_fp32_groups, part.optimizer.param_groups, strict=True):
            decays.update({names[parameter]: group["weight_decay"] for parameter in members})
    return decays


def sizes_of_state(experiment: Experiment) -> int:
    """Numbers of this rank's part of the optimizer's master weights."""
    optimizer, _, _ = built(experiment)
    return sum(
        parameter.numel()
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    )
