"""Run on ranks: build a tiny model under its layout, take optimizer steps, and say what came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import device as devices
from megatron_moe.engine import groups, schedule
from megatron_moe.engine.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan as plans


@dataclass
class Model:
    """One rank's share of a model."""

    experiment: Experiment
    plan: plans.Plan
    chunks: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any


def build(experiment: Experiment) -> Model:
    """Groups, model, optimizer and schedule of this rank."""
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, experiment.training.seed, timeout_s=120)
    dtype = devices.start(0).resolve_precision(experiment.training.precision)
    chunks = build_chunks(experiment, plan, dtype)
    config = _config(chunks)
    wrapped = wrap_data_parallel(config, chunks, experiment.parallel)
    optimizer = build_optimizer(experiment, wrapped, dtype)
    schedule.prepare(config, optimizer, wrapped)
    return Model(experiment, plan, wrapped, optimizer, build_scheduler(experiment, optimizer))


def global_batch(experiment: Experiment, iteration: int, padded: bool) -> list[dict[str, torch.Tensor]]:
    """The microbatches of one step, the same on every rank; with `padded` the tail of each sequence is no
    target."""
    training = experiment.training
    generator = torch.Generator().manual_seed(1000 * iteration + 7)
    microbatches = []
    for index in range(training.global_batch_size // training.micro_batch_size):
        shape = (training.micro_batch_size, training.seq_length + 1)
        text = torch.randint(0, experiment.model.vocab_size or 0, shape, generator=generator)
        mask = torch.ones(shape[0], training.seq_length)
        if padded:
            lengths = torch.randint(1, training.seq_length, (shape[0],), generator=generator)
            mask = (torch.arange(training.seq_length)[None, :] < lengths[:, None]).float()
            if index == 0:
                mask[0] = 1.0
        positions = torch.arange(training.seq_length).expand(shape[0], -1).contiguous()
        microbatches.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": mask,
                "padding_mask": mask == 0,
                "position_ids": positions,
            }
        )
    return microbatches


def step(model: Model, iteration: int, padded: bool) -> dict[str, float]:
    """One optimizer step; loss, gradient norm and the MoE metrics, the same on every rank."""
    from megatron.core import parallel_state

    from megatron_moe.training.forward import forward_step
    from megatron_moe.training.metrics import moe_metrics, reduce_step

    training, replicas = model.experiment.training, parallel_state.get_data_parallel_world_size()
    mine = global_batch(model.experiment, iteration, padded)[
        parallel_state.get_data_parallel_rank() :: replicas
    ]
    mine = [schedule.share_of_context(batch, torch.device("cpu")) for batch in mine]
    shapes = schedule.Shapes(len(mine), training.micro_batch_size, training.seq_length)
    schedule.zero_gradients(model.chunks, model.optimizer)
    model.scheduler.step(1)
    reports = schedule.run(model.chunks, [iter(mine) for _ in model.chunks], forward_step, shapes)
    updated, grad_norm = schedule.update(model.optimizer, model.chunks)
    assert updated
    sums = reduce_step(model.experiment, model.chunks, reports, False, torch.device("cpu"))
    result = {"loss": sums.loss / sums.targets, "grad_norm": grad_norm}
    if sums.moe is not None:
        result |= moe_metrics(sums.moe, model.experiment, detailed=False)
    return result


def train(experiment: Experiment, padded: bool = False, steps: int = 2) -> list[dict[str, float]]:
    """What each of the first steps reports."""
    model = build(experiment)
    results = [step(model, iteration, padded) for iteration in range(steps)]
    dist.barrier()
    return results


def overfit(experiment: Experiment, steps: int) -> list[dict[str, float]]:
    """What each step over the same batch reports."""
    model = build(experiment)
    return [step(model, 0, padded=False) for _ in range(steps)]


def _config(chunks: list[torch.nn.Module]) -> Any:
    from megatron.core.utils import get_model_config

    return get_model_config(chunks[0])
