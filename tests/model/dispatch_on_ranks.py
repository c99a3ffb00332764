"""Run on ranks: tokens through a dispatcher to experts in float64, with gradients, and what it sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import steps_on_ranks
import torch
import torch.distributed as dist
from counted_traffic import Traffic
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe import dispatch
from megatron_moe.model.moe.dispatch.dispatcher import Dispatcher, Experts
from megatron_moe.model.moe.dispatch.local import Local
from megatron_moe.model.moe.grouped_linear import grouped_linear
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.routing import Routing

HIDDEN, INNER = 6, 8


@dataclass(frozen=True)
class Case:
    """What is dispatched, the same on every rank.

    Attributes:
        moe: the settings.
        ep, etp: ranks = ep * etp.
        tokens: of each rank.
        kind: of routing: `random`, `drops`, `one_rank` (only expert 0 and its neighbours) or `even` (every
            choice of k experts equally often).
        replicated: every rank has the tokens of the first.
    """

    moe: MoE
    ep: int
    etp: int = 1
    tokens: tuple[int, ...] = ()
    kind: str = "random"
    replicated: bool = False


@dataclass
class Inputs:
    """Leaves of autograd."""

    tokens: Tensor
    weights: Tensor
    first: Tensor
    second: Tensor
    experts: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    kept: Tensor | None = None

    @property
    def gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in (self.tokens, self.weights, self.first, self.second)]  # type: ignore[misc]


def inputs(case: Case, rank: int) -> Inputs:
    """Tokens of one rank, and the weights of all experts [e, f, h] and [e, h, f]."""
    e, k = case.moe.num_moe_experts, case.moe.moe_router_topk
    common, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + rank)
    number = case.tokens[rank]

    def draw(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    if case.kind == "even":
        choices = torch.combinations(torch.arange(e), k)
        experts = choices.repeat(number // len(choices), 1)
        assert len(experts) == number
    elif case.kind == "one_rank":
        experts = torch.arange(k).expand(number, k).contiguous()
    else:
        experts = torch.rand(number, e, generator=own).argsort(dim=1)[:, :k]
    kept = torch.rand(number, k, generator=own) < 0.6 if case.kind == "drops" else None
    return Inputs(
        draw(own, number, HIDDEN),
        draw(own, number, k),
        draw(common, e, INNER, HIDDEN),
        draw(common, e, HIDDEN, INNER),
        experts,
        kept,
    )


def experts_of(given: Inputs, here: slice, inner: slice) -> Experts:
    """The experts `here`, of which this rank computes the columns `inner`."""

    def experts(tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        inside = grouped_linear(tokens, given.first[here, inner].contiguous(), counts).tanh()
        outside = grouped_linear(inside, given.second[here, :, inner].contiguous(), counts)
        return outside * weights.unsqueeze(-1), None

    return experts


def pass_through(
    dispatcher: Dispatcher, given: Inputs, experts: Experts, meanwhile: bool, watch: Any = None
) -> Tensor:
    """Forward, and backward of a loss that tells all elements apart."""
    weights = given.weights if given.kept is None else given.weights * given.kept
    routing = Routing(given.experts, weights, given.kept)
    beside: Callable[[], Tensor] | None = (lambda: given.tokens.sin()) if meanwhile else None
    output = dispatcher(given.tokens, routing, experts, beside)
    if watch is not None:
        watch()
    (output * torch.arange(1, 1 + output.numel()).view_as(output).cos()).sum().backward()
    return output.detach()


def alone(case: Case, meanwhile: bool = False) -> list[tuple[Tensor, list[Tensor]]]:
    """What one process computes for each rank's tokens: output, gradients."""
    results = []
    for rank in range(case.ep * case.etp):
        given = inputs(case, 0 if case.replicated else rank)
        experts = experts_of(given, slice(None), slice(None))
        output = pass_through(Local(case.moe.num_moe_experts), given, experts, meanwhile)
        results.append((output, given.gradients))
    return results


def groups_of(case: Case) -> MoEGroups:
    """ETP counted first, as Megatron-Core does."""
    world = case.ep * case.etp
    rank = dist.get_rank()
    everyone = dist.new_group(range(world))
    across = [dist.new_group(range(part, world, case.etp)) for part in range(case.etp)]
    along = [dist.new_group(range(first, first + case.etp)) for first in range(0, world, case.etp)]
    return MoEGroups(
        tensor=everyone if case.replicated else None,
        expert=across[rank % case.etp],
        expert_tensor=along[rank // case.etp],
        expert_ranks=everyone,
        replicated_tokens=case.replicated,
    )


def dispatched(case: Case, meanwhile: bool = False) -> tuple[str, Tensor, list[Tensor], dict[str, Any]]:
    """The dispatcher's class, output, gradients (of weights of experts elsewhere: zeros), and bytes sent
    forward and in all by this rank to others."""
    groups, rank = groups_of(case), dist.get_rank()
    given = inputs(case, 0 if case.replicated else rank)
    count, width = case.moe.num_moe_experts // case.ep, INNER // case.etp
    here = slice(rank // case.etp * count, (rank // case.etp + 1) * count)
    inner = slice(rank % case.etp * width, (rank % case.etp + 1) * width)
    dispatcher = dispatch.dispatcher(case.moe, groups, HIDDEN, torch.float64)
    sent: dict[str, Any] = {}
    with Traffic() as traffic:
        output = pass_through(
            dispatcher,
            given,
            experts_of(given, here, inner),
            meanwhile,
            lambda: sent.update(forward=traffic.total),
        )
    sent["all"] = traffic.total
    return type(dispatcher).__name__, output, given.gradients, sent


def replica_traffic(experiment: Experiment) -> tuple[dict[tuple[int, ...], int], list[set[int]], int]:
    """One MoE layer of a model under its layout, forward and backward with one microbatch.

    Returns:
        Bytes this rank sent, by the ranks of the group; the data-parallel replicas; tokens of this rank.
    """
    from megatron.core.transformer.moe import moe_layer

    made = steps_on_ranks.build(experiment)
    layer: Any = next(part for part in made.chunks[0].modules() if isinstance(part, moe_layer.MoELayer))
    training, layout = experiment.training, made.plan.layout
    shares = layout.tensor_model_parallel_size * layout.context_parallel_size
    hidden = torch.randn(
        training.seq_length // shares, training.micro_batch_size, experiment.model.hidden_size
    ).requires_grad_()
    with Traffic() as traffic:
        output, _ = layer(hidden)
        output.square().sum().backward()
    replicas = [set(group) for group in layout.groups("tp_cp")]
    return dict(traffic.sent), replicas, len(output) * output.size(1)


def evaluated(experiment: Experiment) -> tuple[str, Tensor]:
    """The dispatcher of a model's first MoE layer, and what that makes of the same tokens on all ranks."""
    from megatron.core.transformer.moe import moe_layer

    made = steps_on_ranks.build(experiment)
    layer: Any = next(part for part in made.chunks[0].modules() if isinstance(part, moe_layer.MoELayer))
    generator, width = torch.Generator().manual_seed(5), experiment.model.hidden_size
    with torch.no_grad():
        output, _ = layer.eval()(torch.randn(7, 2, width, generator=generator))
    return type(layer.token_dispatcher).__name__, output
