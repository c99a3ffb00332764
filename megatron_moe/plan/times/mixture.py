"""How long a mixture of experts takes: router, the tokens' way to their experts and back, the experts."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from megatron_moe.config.capacity_factor import limit
from megatron_moe.config.rule import set_value
from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan.costs.weight import first_width
from megatron_moe.plan.journeys import Journey, Ranks, journeys, taken
from megatron_moe.plan.times.collectives import all_gather_s, all_to_all_s, exchange_s
from megatron_moe.plan.times.feed_forward import activation, feed_forward
from megatron_moe.plan.times.kernels import Cost
from megatron_moe.plan.times.work import Work

_ROUTER_KERNELS = 20
"""Small ones: scores, top-k, gates, losses, counts."""
_WAITS = 10
"""Kernels' fixed times for which the host waits, and the GPU with it, where it must know how many tokens
come: without a capacity that is padded to."""


@dataclass(frozen=True)
class Mixture:
    """The parts of one layer.

    Attributes:
        local: router, sorting and experts.
        activation: of the experts; a part of `local`.
        shared: shared experts; zero without.
        travel_s: tokens to their experts and back, one pass.
    """

    local: Cost
    activation: Cost
    shared: Cost
    travel_s: float


def mixture(work: Work) -> Mixture:
    """The parts of an MoE layer behind its norm."""
    experiment, layout, kernels = work.experiment, work.layout, work.kernels
    moe = experiment.moe
    assert moe is not None
    width = experiment.model.hidden_size
    local = _router(work, moe)
    expert_ranks, parts = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    copies = work.here * moe.moe_router_topk
    rows = copies * parts * load(work, moe)
    experts = moe.num_moe_experts // expert_ranks
    inner = set_value(moe.moe_ffn_hidden_size) / parts
    kind = set_value(moe.moe_expert_activation)
    each = rows / experts
    local += kernels.product(each, width, first_width(kind, 1) * inner, experts)
    local += kernels.product(each, inner, width, experts)
    acts = activation(kernels, kind, rows * inner)
    local += acts
    # Tokens are read and their copies written, and on the way back the copies read and summed; on ranks with
    # several experts what came is sorted by them, and back.
    sorts = 2 * rows if experts > 1 and expert_ranks * parts > 1 else 0.0
    moved = 2 * copies + copies + work.here + 2 * sorts
    passes = 1 if moe.moe_permute_fusion else 2
    local += kernels.streamed(moved * width, moved * width, 4 * passes)
    if not moe.moe_pad_expert_input_to_capacity and expert_ranks * parts > 1:
        local += Cost(_WAITS * work.cluster.kernel_s, 0.0)
    shared = Cost()
    if moe.moe_shared_expert_intermediate_size is not None:
        shared = feed_forward(work, moe.moe_shared_expert_intermediate_size, experiment.model.activation)
        shared += kernels.streamed(3 * width * work.here, 3 * width * work.here)
    return Mixture(local, acts, shared, _travel_s(work, moe))


def load(work: Work, moe: MoE) -> float:
    """Rows of the fullest rank's experts over the mean."""
    imbalance = work.experiment.launch.expert_imbalance
    factor = limit(moe.moe_expert_capacity_factor)
    if factor is None:
        return imbalance
    return factor if moe.moe_pad_expert_input_to_capacity else min(imbalance, factor)


def _router(work: Work, moe: MoE) -> Cost:
    """The router's product in float32, and scores, choice and losses of each token."""
    cluster, width, e = work.cluster, work.experiment.model.hidden_size, moe.num_moe_experts
    operations = 2.0 * work.here * width * e
    # Tokens are read, written in float32, and read.
    cast_s = work.here * width * (work.size + 8) / cluster.memory_rate
    product_s = operations / cluster.fp32_flops + cluster.kernel_s
    small = work.kernels.streamed(16 * work.here * e, 16 * work.here * e, _ROUTER_KERNELS)
    return small + Cost(cast_s + product_s, cast_s + 2 * product_s, product_s)


def _travel_s(work: Work, moe: MoE) -> float:
    layout, cluster = work.layout, work.cluster
    together = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    if together == 1:
        return 0.0
    width = work.experiment.model.hidden_size
    ranks = Ranks(
        layout.expert_model_parallel_size, layout.expert_tensor_parallel_size, moe.moe_ranks_per_node
    )
    name = taken(moe, width, work.size, ranks)
    if name == "flex":
        return _by_nodes_s(work, moe)
    by_name = {journey.dispatcher: journey for journey in journeys(moe, width, work.size, ranks)}
    journey: Journey = by_name[name]
    sent = journey.bytes * work.here / 2
    group = work.groups.experts
    if name == "allgather":
        return 2 * all_gather_s(cluster, group, sent * together / (together - 1))
    sent *= load(work, moe)
    if journey.bytes_between_nodes is not None:
        between = sent * journey.bytes_between_nodes / journey.bytes
        return 2 * (exchange_s(cluster, sent - between, 0.0) + exchange_s(cluster, 0.0, between))
    return 2 * all_to_all_s(cluster, group, sent)


def _by_nodes_s(work: Work, moe: MoE) -> float:
    """The dispatcher `flex`: one copy of a token to each node that it has experts on, and from there one to
    each rank (DeepEP). Its kernels reach on links what other collectives do."""
    group, e, k = work.groups.experts, moe.num_moe_experts, moe.moe_router_topk
    nodes, expert_ranks = group.nodes, work.layout.expert_model_parallel_size
    copies_a_node = 1 - comb(e - e // min(nodes, expert_ranks), k) / comb(e, k)
    copies_a_rank = 1 - comb(e - e // expert_ranks, k) / comb(e, k)
    size = work.here * work.experiment.model.hidden_size * work.size * load(work, moe)
    within = size * copies_a_rank * (group.size - 1)
    others = copies_a_node * (nodes - 1)
    if moe.moe_router_num_groups is not None and moe.moe_router_group_topk is not None:
        # Of the groups that a token's experts may come from, as many lie on other nodes as on average.
        reached = moe.moe_router_group_topk / moe.moe_router_num_groups
        others = min(others, max(reached, 1 / nodes) * (nodes - 1))
    between = size * others
    return 2 * exchange_s(work.cluster, within, between, fraction=1.0)
