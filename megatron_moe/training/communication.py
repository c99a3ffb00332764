"""How long tokens travelled in a step, how much of that was hidden, and what travelled to them instead."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.engine.stopwatch import Stopwatch
from megatron_moe.model.moe.dispatch.hot_experts import HotExperts
from megatron_moe.model.moe.dispatch.transfer import TransferTimes


def is_measured(experiment: Experiment) -> bool:
    """Whether tokens travel to their experts, by dispatchers of ours."""
    moe = experiment.moe
    if moe is None or moe.moe_token_dispatcher_type == "flex" or moe.overlap_moe_expert_parallel_comm:
        return False
    return _expert_ranks(experiment) > 1


def overlaps(experiment: Experiment) -> bool:
    """Whether anything is computed while tokens travel."""
    moe = experiment.moe
    return moe is not None and (moe.moe_overlap_degree > 1 or moe.moe_shared_expert_overlap)


def copies_experts(experiment: Experiment) -> bool:
    """Whether hot experts may be copied."""
    moe = experiment.moe
    return moe is not None and moe.moe_shadowing is not None and _expert_ranks(experiment) > 1


def begin(chunks: list[torch.nn.Module]) -> None:
    """Measure from now on."""
    for times in _of_layers(chunks):
        times.on = True


def end(chunks: list[torch.nn.Module], device: torch.device) -> dict[str, float]:
    """What was measured since `begin`, means over the ranks that have experts; measures no longer.

    A collective over the world.
    """
    mine = torch.zeros(3, dtype=torch.float64)
    for times in _of_layers(chunks):
        mine[:2] += torch.tensor(times.take(), dtype=torch.float64)
        mine[2] = 1
        times.on = False
    total = mine.to(device)
    dist.all_reduce(total)
    under_way, waited, ranks = total.tolist()
    return {
        "moe/communication_ms": 1000 * under_way / ranks,
        "moe/exposed_communication_ms": 1000 * waited / ranks,
    }


def waits(chunks: list[torch.nn.Module], stopwatch: Stopwatch) -> list[tuple[float, float]]:
    """When this rank waited for tokens since `begin`: begins and ends, in the stopwatch's seconds."""
    since_start = stopwatch.since_start
    moments = [moment for times in _of_layers(chunks) for moment in times.waits()]
    return sorted((since_start(begin), since_start(end)) for begin, end in moments)


def copied_experts(chunks: list[torch.nn.Module], device: torch.device) -> dict[str, float]:
    """Experts that were copied since this was last asked, mean over microbatches and MoE layers.

    A collective over the world.
    """
    counts = torch.zeros(2, dtype=torch.float64)
    for module in (module for chunk in chunks for module in unwrap(chunk).modules()):
        dispatcher = getattr(module, "token_dispatcher", None)
        if isinstance(dispatcher, HotExperts):
            counts += torch.tensor(dispatcher.take(), dtype=torch.float64)
    total = counts.to(device)
    dist.all_reduce(total)
    copied, microbatches = total.tolist()
    return {"moe/shadowed_experts": copied / microbatches}


def _expert_ranks(experiment: Experiment) -> int:
    parallel = experiment.parallel
    return (parallel.expert_model_parallel_size or 1) * (parallel.expert_tensor_parallel_size or 1)


def _of_layers(chunks: list[torch.nn.Module]) -> list[TransferTimes]:
    layers = [module for chunk in chunks for module in unwrap(chunk).modules()]
    found = (getattr(layer, "transfer_times", None) for layer in layers)
    return [times for times in found if times is not None]
