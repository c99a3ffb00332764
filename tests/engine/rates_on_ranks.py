"""Run on ranks: learning rates as the schedule sets them, and optimizer steps with made-up gradients."""

from __future__ import annotations

import zlib

import torch
from optimizer_on_ranks import built
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.engine.optimizer import learning_rates


def rates(experiments: list[Experiment], first: int, steps: int) -> list[list[dict[str, float]]]:
    """For each experiment the rates of the steps behind `first`, set as the trainer sets them.

    Raises AssertionError where a parameter group has another rate than what is reported.
    """
    results = []
    for experiment in experiments:
        optimizer, scheduler, _ = built(experiment)
        result = []
        for iteration in range(first, first + steps):
            scheduler.num_steps = iteration
            scheduler.step(1)
            reported = learning_rates(experiment, scheduler)
            assert {group["lr"] for group in optimizer.param_groups} <= set(reported.values())
            result.append(reported)
        results.append(result)
        groups.destroy()
    return results


def gradient(name: str, step: int, like: Tensor) -> Tensor:
    """A made-up gradient, the same wherever it is asked for."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(like.shape, generator=generator)


def updated(experiment: Experiment, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In one process: the weights by name before and after so many steps."""
    optimizer, scheduler, chunks = built(experiment)
    weights = dict(unwrap(chunks[0]).named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in range(steps):
        for name, weight in weights.items():
            weight.main_grad.copy_(gradient(name, step, weight))  # type: ignore[operator, union-attr]
        scheduler.num_steps = step
        scheduler.step(1)
        optimizer.step()
    return before, {name: weight.detach().clone() for name, weight in weights.items()}
