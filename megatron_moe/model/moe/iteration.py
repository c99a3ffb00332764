"""What a training loop of one's own says to the mixtures of its model, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.capacity_factor import limit
from megatron_moe.config.errors import InputError, RunError
from megatron_moe.model.moe.attached import Scale
from megatron_moe.model.moe.layer import Mixture
from megatron_moe.model.moe.layer_sums import COLUMNS
from megatron_moe.model.moe.library_router import LibraryRouter, Statistics

_NOT_FINITE = COLUMNS.index("not_finite") - len(COLUMNS)


def mixtures(model: torch.nn.Module) -> dict[str, Mixture]:
    """All mixtures of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}


def statistics(model: torch.nn.Module) -> dict[str, Statistics]:
    """What each router did on this rank since the iteration began, by its name. Waits for the device."""
    return {name: router.read() for name, router in _routers(model).items()}


def aux_loss(model: torch.nn.Module) -> Tensor:
    """[] sum of the routers' losses times their coefficients, of the last call of each. For mixtures made
    with attach_losses=False: add it to the loss of each microbatch, before that goes backward."""
    losses = [r.balancing.collected for r in _routers(model).values() if not r.balancing.is_attached]
    if not losses:
        raise InputError(
            "attach_losses: is true in all mixtures of this model; their losses come along already"
        )
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).sum()


def scale_losses(model: torch.nn.Module, scale: float | Scale) -> None:
    """Multiply the gradients of attached losses from now on: by 1 / n where the loss of each of n
    microbatches is divided by n, by `scaler.get_scale` (the function) with a loss scaler."""
    given: Scale = scale if callable(scale) else lambda: scale
    for router in _routers(model).values():
        router.loss_scale = given


@contextmanager
def telling(
    model: torch.nn.Module, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
) -> Iterator[None]:
    """While the context holds, what every mixture is told of the tokens that it gets, [b, s]; for models that
    don't pass it on. With recomputation the backward pass belongs into the context too."""
    here = mixtures(model).values()
    for mixture in here:
        mixture.given = (padding_mask, token_ids)
    try:
        yield
    finally:
        for mixture in here:
            mixture.given = (None, None)


@torch.no_grad()
def end_iteration(model: torch.nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Move adaptive and scheduled coefficients and expert biases, and begin statistics anew. To be called
    once for each update of the weights, between backward pass and update, on every rank.

    Args:
        group: the ranks that share the global batch; None: all, or this process alone.

    Raises RunError where a router got logits that are not finite, on all ranks, before anything is moved.
    """
    routers = _routers(model)
    if not routers:
        raise InputError("end_iteration: there is no mixture in this model; make one with megatron_moe.moefy")
    sums, broken = _over_ranks(list(routers.values()), group)
    for name, its in zip(routers, sums, strict=True):
        if its[_NOT_FINITE]:
            ranks = ", ".join(str(rank) for rank in broken)
            raise RunError(f"{name}: got logits that are not finite, on rank {ranks}; nothing was updated")
    for router, its in zip(routers.values(), sums, strict=True):
        load, columns = its.split([router.moe.num_moe_experts, len(COLUMNS)])
        drops = limit(router.moe.moe_expert_capacity_factor) is not None
        column = dict(zip(COLUMNS, columns.tolist(), strict=True))
        routed = column["assigned"]
        rate = column["dropped" if drops else "would_drop"] / routed if routed else None
        router.end_iteration(load.to(router.sums.device), rate)
        router.sums.zero_()


def _over_ranks(
    routers: list[LibraryRouter], group: dist.ProcessGroup | None
) -> tuple[list[Tensor], list[int]]:
    """Each router's sums, added up over the ranks, on the host; and the ranks with logits that are not
    finite."""
    is_alone = not dist.is_initialized()
    size, own = (1, 0) if is_alone else (dist.get_world_size(group), dist.get_rank(group))
    lengths = [len(router.sums) for router in routers]
    device = routers[0].sums.device
    if not is_alone and dist.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    broken = torch.zeros(size, dtype=torch.float64, device=device)
    broken[own] = sum(router.sums[_NOT_FINITE].to(device) for router in routers)
    whole = torch.cat([*(router.sums.to(device) for router in routers), broken])
    if not is_alone:
        dist.all_reduce(whole, group=group)
    *sums, broken = whole.cpu().split([*lengths, size])
    return sums, broken.nonzero().flatten().tolist()


def _routers(model: torch.nn.Module) -> dict[str, LibraryRouter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LibraryRouter)}
