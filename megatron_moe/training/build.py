"""From an experiment to a `Trainer`: groups, model, optimizer, schedule, data."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from megatron_moe.config.schema import Experiment
from megatron_moe.data.prepare import prepare
from megatron_moe.engine import device as devices
from megatron_moe.engine import groups, schedule
from megatron_moe.engine.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan.plan import Plan
from megatron_moe.training.trainer import Trainer


def start(experiment: Experiment, plan: Plan, run_folder: Path) -> Trainer:
    """Make this process one rank of `plan`: join the others, build the model, open the data.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name the process. A collective over all ranks.
    Raises InputError.
    """
    # First, so that Megatron-Core is imported with what stands in for CUDA in place.
    device = devices.start(int(os.environ.get("LOCAL_RANK", 0)))
    from megatron.core.utils import get_model_config

    from megatron_moe.data.pretraining import build_datasets

    timeout_s = experiment.resilience.collective_timeout_s
    groups.initialize_process_group(device, timeout_s)
    groups.initialize_model_parallel(
        plan.layout, experiment.training.seed, timeout_s, plan.rank_of_embedding_copy
    )

    dtype = device.resolve_precision(experiment.training.precision)
    chunks = build_chunks(experiment, plan, dtype)
    config = get_model_config(chunks[0])
    wrapped = wrap_data_parallel(config, chunks, experiment.parallel)
    optimizer = build_optimizer(experiment, wrapped, dtype)
    schedule.prepare(config, optimizer, wrapped)

    prepared = prepare(experiment, Path(experiment.logging.root))
    # Rank 0 makes the sample index, the others read it.
    if dist.get_rank() == 0:
        datasets = build_datasets(experiment, prepared)
    dist.barrier()
    if dist.get_rank() != 0:
        datasets = build_datasets(experiment, prepared)
    return Trainer(
        experiment=experiment,
        plan=plan,
        device=device,
        chunks=wrapped,
        optimizer=optimizer,
        scheduler=build_scheduler(experiment, optimizer),
        prepared=prepared,
        datasets=datasets,
        run_folder=run_folder,
    )
