"""Our layer: router, dispatch and experts as models have them."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.layer_settings import moe_settings
from megatron_moe.model.moe import grouped_linear
from megatron_moe.model.moe.dispatch import dispatcher
from megatron_moe.model.moe.experts import Experts, ExpertSettings
from megatron_moe.model.moe.groups import MoEGroups, rank, size
from megatron_moe.model.moe.router import Router
from moe_peers.contender import Contender, Maker, Problem, of_module


class Layer(torch.nn.Module):
    """The parts in a row, with the auxiliary loss and the statistics of a router that trains."""

    def __init__(self, problem: Problem, groups: MoEGroups, **settings: Any) -> None:
        super().__init__()
        shape = problem.shape
        moe = moe_settings(
            shape.hidden,
            {
                "num_moe_experts": shape.experts,
                "moe_router_topk": shape.topk,
                "moe_ffn_hidden_size": shape.width,
            }
            | ({"moe_router_pre_softmax": True} if shape.topk == 1 else {})
            | settings,
            size(groups.expert),
        )
        dtype, device = problem.fc1.dtype, problem.fc1.device
        self.router = Router(moe, shape.hidden, groups, dtype=dtype, device=device)
        assert self.router.weight is not None
        self.router.weight.data = problem.router
        local = shape.experts // size(groups.expert)
        mine = slice(local * rank(groups.expert), local * (rank(groups.expert) + 1))
        self.experts = Experts(
            local, ExpertSettings(shape.hidden, shape.width, dtype=dtype, device=device), groups
        )
        parts, part = size(groups.expert_tensor), rank(groups.expert_tensor)
        gate, up = (x.chunk(parts, dim=1)[part] for x in problem.fc1[mine].chunk(2, dim=1))
        # Without a split they stay where they are, shared with other contenders.
        whole = parts == 1
        self.experts.linear_fc1.data = problem.fc1[mine] if whole else torch.cat([gate, up], dim=1)
        self.experts.linear_fc2.data = problem.fc2[mine].chunk(parts, dim=2)[part].contiguous()
        self.dispatcher = dispatcher(moe, groups, shape.hidden, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """[t, h] -> [t, h]."""
        return self.dispatcher(tokens, self.router(tokens.unsqueeze(1)), self.experts)

    def forget(self) -> None:
        """What the router counted."""
        self.router.statistics.rows.clear()


def alone(problem: Problem) -> Contender:
    """All experts on this rank."""
    return _contender("ours", Layer(problem, MoEGroups()))


def into_buffer(problem: Problem) -> Contender:
    """As it trains: gradients of the experts are added to Megatron-Core's gradient buffer."""
    layer = Layer(problem, MoEGroups())
    weights: list[Any] = [layer.experts.linear_fc1, layer.experts.linear_fc2]
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight)
    return _contender("ours, gradients into Megatron-Core's buffer", layer)


def looped(problem: Problem) -> Contender:
    """On a GPU: one product an expert, not a grouped one."""
    layer = Layer(problem, MoEGroups())
    contender = _contender("ours, one product an expert", layer)
    one_by_one = mock.patch.object(grouped_linear, "_rows_are_aligned", lambda weight: False)

    def forward(tokens: Tensor) -> Tensor:
        with one_by_one:
            return layer(tokens)

    contender.forward = forward
    return contender


def _contender(name: str, layer: Layer) -> Contender:
    contender = of_module(name, layer, layer)
    contender.clean = layer.forget
    return contender


def spread(ranks: int) -> list[Maker]:
    """Our folds and dispatchers over all ranks."""
    makers: list[Maker] = [
        partial(_spread, "EDP (EP = all ranks), all-to-all", ep=ranks, moe_token_dispatcher_type="alltoall"),
        partial(_spread, "EDP, each token once a rank", ep=ranks, moe_token_dispatcher_type="deduplicated"),
        partial(_spread, "EDP, all-gather", ep=ranks, moe_token_dispatcher_type="allgather"),
        partial(_spread, "ETP = all ranks, all-to-all", ep=1, moe_token_dispatcher_type="alltoall"),
        partial(_spread, "ETP = all ranks, all-gather", ep=1, moe_token_dispatcher_type="allgather"),
    ]
    if ranks == 4:
        makers.append(
            partial(
                _spread, "EDP of 2 replicas (EP = 2 inside each)", ep=2, moe_token_dispatcher_type="alltoall"
            )
        )
    return makers


def _spread(name: str, problem: Problem, ep: int, **settings: Any) -> Contender:
    """Experts over groups of `ep` neighbouring ranks, or with ep 1 each expert over all ranks."""
    if ep == 1:
        groups = MoEGroups(expert_tensor=dist.group.WORLD, expert_ranks=dist.group.WORLD)
    else:
        group: Any = dist.group.WORLD
        if ep < problem.ranks:
            group, _ = dist.new_subgroups(ep)
        groups = MoEGroups(expert=group, expert_ranks=group)

    return _contender(f"ours: {name}", Layer(problem, groups, **settings))
