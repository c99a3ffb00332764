"""Mixtures over several ranks without Megatron-Core: groups, and gradients by the group that reduces them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.groups import MoEGroups, size
from megatron_moe.model.moe.iteration import mixtures
from megatron_moe.plan.wording import plural


def expert_groups(expert_parallel_size: int) -> dict[str, Any]:
    """Arguments of a mixture whose experts are spread over blocks of neighbouring ranks: `process_group`, and
    `expert_data_group` with the ranks that hold the same experts. To be called by all ranks."""
    _need_process_group("expert_groups")
    world, own = dist.get_world_size(), dist.get_rank()
    if expert_parallel_size < 1 or world % expert_parallel_size:
        fitting = ", ".join(str(count) for count in range(1, world + 1) if world % count == 0)
        raise InputError(
            f"expert_parallel_size: {expert_parallel_size} does not divide the {world} ranks; use one of "
            f"{fitting}"
        )
    blocks = [
        list(range(start, start + expert_parallel_size)) for start in range(0, world, expert_parallel_size)
    ]
    found: dict[str, Any] = {}
    for name, all_ranks in (("process_group", blocks), ("expert_data_group", zip(*blocks, strict=True))):
        for ranks in all_ranks:
            group = dist.new_group(list(ranks))
            if own in ranks:
                found[name] = group
    return found


def spread_parameters(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Parameter, MoEGroups]]:
    """The parameters of experts that are spread over ranks, by name, with the groups of their mixture."""
    return {
        f"{name}.experts.{rest}" if name else f"experts.{rest}": (parameter, mixture.groups)
        for name, mixture in mixtures(model).items()
        if size(mixture.groups.expert) > 1
        for rest, parameter in mixture.experts.named_parameters()
    }


def keep_from_ddp(model: torch.nn.Module) -> list[str]:
    """Let DistributedDataParallel pass over experts that are spread over ranks: each rank has others. Call it
    before wrapping, and `average_gradients(model, experts_only=True)` after each backward pass. Returns the
    names of their parameters."""
    names = list(spread_parameters(model))
    ignored: Any = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [*ignored, *names]
    )
    return names


@torch.no_grad()
def average_gradients(
    model: torch.nn.Module, group: dist.ProcessGroup | None = None, experts_only: bool = False
) -> None:
    """Make every gradient that of the mean of the ranks' losses, by the group that reduces it.

    Experts that are spread over ranks have seen all of their ranks' tokens already: their gradients are added
    up over the ranks that hold the same experts. All others are added up over all ranks.

    Args:
        group: the data-parallel ranks; None: all ranks.
        experts_only: leave the others to DistributedDataParallel.

    Raises InputError where the groups of spread experts don't cover these ranks, and without a process group.
    """
    _need_process_group("average_gradients")
    world = dist.get_world_size(group)
    spread = {id(parameter): groups for parameter, groups in spread_parameters(model).values()}
    for of_expert in spread.values():
        spread_over, copies = size(of_expert.expert), size(of_expert.expert_data)
        if spread_over * copies != world:
            raise InputError(
                f"expert_data_group: has {plural(copies, 'rank')} beside the {spread_over} of process_group, "
                f"of {plural(world, 'rank')} in all; pass both groups that megatron_moe.expert_groups makes"
            )
    for parameter in model.parameters():
        groups = spread.get(id(parameter))
        if not parameter.requires_grad or (groups is None and experts_only):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if groups is None:
            dist.all_reduce(parameter.grad, group=group)
        elif size(groups.expert_data) > 1:
            dist.all_reduce(parameter.grad, group=groups.expert_data)
        parameter.grad /= world


def _need_process_group(asked_by: str) -> None:
    if not dist.is_initialized():
        raise InputError(f"{asked_by}: there is no process group; call torch.distributed.init_process_group")
