"""Run on ranks: a layer alone under data and expert parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe.model.moe.iteration import end_iteration
from megatron_moe.model.moe.layer import MixtureOfExperts
from megatron_moe.model.moe.mixture import MultiGateMixture
from megatron_moe.model.moe.parallel import average_gradients, expert_groups, keep_from_ddp, spread_parameters

WIDTH = 16


class Network(nn.Module):
    """Something dense around a mixture."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mixture = MixtureOfExperts(WIDTH, num_experts=4, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixture(torch.tanh(self.into(x))))


class Own(nn.Module):
    """An expert of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(torch.tanh(self.inside(x)))


def build(own: bool, settings: dict[str, Any]) -> Network:
    """The same weights whatever the group."""
    torch.manual_seed(3)
    return Network(expert=Own if own else None, moe_z_loss_coeff=0.1, **settings)


def data(rank: int) -> Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(rank))


def step(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    loss.backward()
    return loss.detach()


def gradients(
    expert_parallel_size: int | None, wrapped: bool, own: bool, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Of one step on every rank's own tokens: by name, experts by their number among all; and what the
    router's state is after the iteration."""
    groups = {} if expert_parallel_size is None else expert_groups(expert_parallel_size)
    model = build(own, settings | groups)
    names = keep_from_ddp(model)
    assert set(names) == set(spread_parameters(model))
    if wrapped:
        step(nn.parallel.DistributedDataParallel(model), data(dist.get_rank()))
        average_gradients(model, experts_only=True)
    else:
        step(model, data(dist.get_rank()))
        average_gradients(model)
    end_iteration(model)
    first = 0 if expert_parallel_size is None else dist.get_rank() % expert_parallel_size
    return by_expert(model, first * model.mixture.local_experts)


def by_expert(model: Network, first: int) -> dict[str, Tensor]:
    """Gradients and router's buffers; every expert under its number among all."""
    found = {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".modules_of_experts." in name:
            before, _, after = name.partition(".modules_of_experts.")
            number, _, rest = after.partition(".")
            found[f"{before}.{int(number) + first}.{rest}"] = parameter.grad
        elif ".experts." in name:
            found |= {f"{name}.{index + first}": grad for index, grad in enumerate(parameter.grad)}
        else:
            found[name] = parameter.grad
    return found


def refusals() -> list[str]:
    """What is said of groups that don't fit."""
    from megatron_moe.config.errors import InputError

    messages = []
    group: Any = 2
    pair = expert_groups(2)["process_group"]
    without_copies = MixtureOfExperts(WIDTH, num_experts=4, process_group=pair)
    for attempt in (
        lambda: expert_groups(3),
        lambda: MixtureOfExperts(WIDTH, num_experts=5, **expert_groups(2)),
        lambda: MixtureOfExperts(WIDTH, num_experts=4, process_group=group),
        lambda: average_gradients(without_copies),
    ):
        try:
            attempt()
        except InputError as error:
            messages.append(str(error))
    return messages


def many_gates() -> list[Tensor]:
    """Outputs of two gates over experts that are spread over all ranks."""
    torch.manual_seed(3)
    mixture = MultiGateMixture(WIDTH, num_gates=2, num_experts=4, **expert_groups(2))
    return [output.detach() for output in mixture(data(dist.get_rank()))]
