"""Runs in rank processes for test_alltoall.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema.moe import Shadowing
from megatron_moe.model.moe.dispatch.alltoall import AllToAll
from megatron_moe.model.moe.dispatch.exchange import start
from megatron_moe.model.moe.dispatch.hot_experts import HotExperts
from megatron_moe.model.moe.dispatch.local import Local
from megatron_moe.model.moe.experts import Experts, ExpertSettings
from megatron_moe.model.moe.groups import MoEGroups, rank, size
from megatron_moe.model.moe.routing import Routing

HIDDEN, WIDTH = 16, 24


@dataclass(frozen=True)
class Case:
    """A routing for each rank.

    Attributes:
        tokens: how many each rank has.
        experts: e.
        favourite: every token's first choice; None: random.
        dropped: every n-th assignment is dropped.
        etp: ranks that hold parts of each expert.
    """

    tokens: tuple[int, ...]
    experts: int = 8
    favourite: int | None = None
    dropped: int | None = None
    etp: int = 1

    def of_rank(self, number: int) -> tuple[Tensor, Routing]:
        """Tokens [t, h] and their routing, top-2."""
        made = torch.Generator().manual_seed(number)
        t = self.tokens[number]
        tokens = torch.randn(t, HIDDEN, generator=made).requires_grad_()
        scores = torch.rand(t, self.experts, generator=made)
        if self.favourite is not None:
            scores[:, self.favourite] = 2.0
        experts = scores.topk(2).indices
        weights = torch.rand(t, 2, generator=made)
        kept = None
        if self.dropped is not None:
            kept = (torch.arange(2 * t).view(t, 2) % self.dropped) > 0
            weights = weights * kept
        return tokens, Routing(experts, weights.requires_grad_(), kept)


def all_experts(case: Case) -> Experts:
    """Experts of one process, with weights and biases."""
    settings = ExpertSettings(HIDDEN, WIDTH, has_bias=True)
    experts = Experts(case.experts, settings)
    made = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=made)
    return experts


def _part(case: Case, groups: MoEGroups) -> Experts:
    """This rank's experts."""
    whole = all_experts(case)
    mine = Experts(case.experts // size(groups.expert), whole.settings, groups)
    place, parts = rank(groups.expert_tensor), size(groups.expert_tensor)
    for (name, parameter), source in zip(mine.named_parameters(), whole.parameters(), strict=True):
        piece = source.data.chunk(size(groups.expert))[rank(groups.expert)]
        if name == "linear_fc2":
            piece = piece.chunk(parts, dim=2)[place]
        elif name == "bias_fc2.bias":
            piece = piece.chunk(parts, dim=1)[place]
        else:
            gate, up = piece.chunk(2, dim=1)
            piece = torch.cat([gate.chunk(parts, dim=1)[place], up.chunk(parts, dim=1)[place]], dim=1)
        parameter.data.copy_(piece)
    return mine


def _groups(etp: int) -> MoEGroups:
    world = dist.get_world_size()
    everyone = dist.new_group(range(world))
    expert, expert_tensor = everyone, None
    if etp > 1:
        for place in range(etp):
            group = dist.new_group(range(place, world, etp))
            expert = group if dist.get_rank() % etp == place else expert
        for first in range(0, world, etp):
            group = dist.new_group(range(first, first + etp))
            expert_tensor = group if dist.get_rank() // etp * etp == first else expert_tensor
    return MoEGroups(expert=expert, expert_tensor=expert_tensor, expert_ranks=everyone)


def run(case: Case, degrees: list[int], meanwhile: bool = False) -> list[dict[str, Any]]:
    """Output and gradients of this rank for each degree."""
    groups, results = _groups(case.etp), []
    for degree in degrees:
        dispatch = AllToAll(case.experts, groups, partial(start, group=groups.expert_ranks), degree)
        results.append(_outcome(dispatch, *case.of_rank(dist.get_rank()), _part(case, groups), meanwhile))
    return results


def run_copied(case: Case, settings: Shadowing) -> dict[str, Any]:
    """The same with copies of hot experts; `copied`: how many of them."""
    groups = _groups(1)
    others = AllToAll(case.experts, groups, partial(start, group=groups.expert_ranks), degree=2)
    dispatch = HotExperts(others, case.experts, groups, settings)
    result = _outcome(dispatch, *case.of_rank(dist.get_rank()), _part(case, groups), meanwhile=True)
    return {**result, "copied": dispatch.take()[0]}


def alone(case: Case, meanwhile: bool = False) -> dict[str, Any]:
    """The same in one process, over the tokens of all ranks."""
    parts = [case.of_rank(number) for number in range(len(case.tokens))]
    tokens = torch.cat([tokens.detach() for tokens, _ in parts]).requires_grad_()
    routings = [routing for _, routing in parts]
    routing = Routing(
        torch.cat([routing.experts for routing in routings]),
        torch.cat([routing.weights.detach() for routing in routings]).requires_grad_(),
        None if case.dropped is None else torch.cat([routing.kept for routing in routings]),
    )
    return _outcome(Local(case.experts), tokens, routing, all_experts(case), meanwhile)


def _outcome(dispatch: Any, tokens: Tensor, routing: Routing, experts: Experts, meanwhile: bool) -> Any:
    beside = (lambda: (tokens * 3).tanh()) if meanwhile else None
    output = dispatch(tokens, routing, experts, beside)
    (output * torch.arange(1.0, HIDDEN + 1)).square().sum().backward()
    return {
        "output": output.detach(),
        "tokens": tokens.grad,
        "weights": routing.weights.grad,
        "parameters": {name: parameter.grad for name, parameter in experts.named_parameters()},
    }
