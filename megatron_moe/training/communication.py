"""How long tokens travelled in a step, and how much of that was hidden behind computation."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.model.moe.dispatch.transfer import TransferTimes


def is_measured(experiment: Experiment) -> bool:
    """Whether tokens travel to their experts, by dispatchers of ours."""
    moe, parallel = experiment.moe, experiment.parallel
    if moe is None or moe.moe_token_dispatcher_type == "flex" or moe.overlap_moe_expert_parallel_comm:
        return False
    return (parallel.expert_model_parallel_size or 1) * (parallel.expert_tensor_parallel_size or 1) > 1


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


def _of_layers(chunks: list[torch.nn.Module]) -> list[TransferTimes]:
    layers = [module for chunk in chunks for module in unwrap(chunk).modules()]
    return [layer.transfer_times for layer in layers if hasattr(layer, "transfer_times")]
