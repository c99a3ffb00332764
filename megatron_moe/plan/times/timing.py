"""How long each piece of a model takes on one rank, for one microbatch."""

from __future__ import annotations

from megatron_moe.config.rule import set_value
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.parameters import padded_vocab_size
from megatron_moe.plan.costs.weights import kind_of_mtp_layers
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.times.attention import attention
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.times.collectives import all_gather_s, exposed_s, point_to_point_s, reduce_scatter_s
from megatron_moe.plan.times.feed_forward import feed_forward
from megatron_moe.plan.times.kernels import Cost
from megatron_moe.plan.times.mixture import Mixture, mixture
from megatron_moe.plan.times.update import after_pieces, after_pipeline, pieces_on, updated_parameters
from megatron_moe.plan.times.work import Work
from megatron_moe.plan.units import Kind, Times

__all__ = [
    "after_pieces",
    "after_pipeline",
    "launch_s",
    "pieces_on",
    "times",
    "transfer",
    "updated_parameters",
]

_OPERATIONS: dict[str, int] = {"dense": 50, "moe": 150}
"""That the host launches for the forward pass of a layer: as many as Megatron-Core's layers have, roughly."""
_OPERATIONS_BACKWARD = 1.6
"""The same backward, over those."""
_LOSS_BYTES = (30, 16)
"""Of each logit, forward and backward: the cross entropy in float32, in several kernels."""


def times(experiment: Experiment, layout: Layout, cluster: Cluster, kind: Kind) -> Times:
    """The times of one piece of a filled experiment."""
    work = Work.of(experiment, layout, cluster)
    if kind == "embedding":
        return _plain(_embedding(work))
    if kind == "head":
        return _plain(_head(work))
    if kind == "mtp":
        return _mtp(work)
    return _layer(work, kind)


def launch_s(cluster: Cluster, kind: Kind) -> tuple[float, float]:
    """What the host takes to launch a layer, forward and backward: no layer takes less."""
    forward_s = _OPERATIONS[kind] * cluster.host_s
    return forward_s, _OPERATIONS_BACKWARD * forward_s


def transfer(experiment: Experiment, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Seconds and bytes of sending a microbatch's activations to the next stage; zero without one."""
    if layout.pipeline_model_parallel_size == 1:
        return 0.0, 0.0
    work = Work.of(experiment, layout, cluster)
    size = work.here * experiment.model.hidden_size * work.size
    return point_to_point_s(cluster, work.groups.stages.nodes > 1, size), size


def _layer(work: Work, kind: Kind) -> Times:
    experiment = work.experiment
    modules = set_value(experiment.recompute.modules)
    width = experiment.model.hidden_size
    norms = _norms(work, 2)
    projections, core = attention(work)
    # Two residual branches; dropout reads and writes a mask.
    is_dropped = experiment.model.hidden_dropout > 0
    residual = work.kernels.streamed(
        (10 if is_dropped else 6) * width * work.here, (6 if is_dropped else 2) * width * work.here, 2
    )
    cost = norms + projections + core + residual
    again_s = norms.forward_s * ("layernorm" in modules) + core.forward_s * ("core_attn" in modules)
    if kind == "dense":
        dense = feed_forward(work, set_value(experiment.model.ffn_hidden_size), experiment.model.activation)
        cost += dense
        again_s += dense.forward_s * ("mlp" in modules)
        return _layer_times(work, kind, cost, (0.0, 0.0), 0.0, again_s)
    parts = mixture(work)
    cost += parts.local + parts.shared
    forward_s, backward_s = _exposed_s(work, parts, cost)
    if "moe" in modules:
        again_s += parts.local.forward_s + parts.shared.forward_s + forward_s
    else:
        again_s += parts.activation.forward_s * ("moe_act" in modules)
        again_s += parts.shared.forward_s * ("shared_experts" in modules)
    hidden_s = 2 * parts.travel_s - forward_s - backward_s
    return _layer_times(work, kind, cost, (forward_s, backward_s), hidden_s, again_s)


def _layer_times(
    work: Work, kind: Kind, cost: Cost, exposed: tuple[float, float], hidden_s: float, again_s: float
) -> Times:
    """A layer's computation, what is exposed of the experts' all-to-all forward and backward, and what
    selective recomputation computes again; or what the host takes to launch them, where that is longer."""
    launched_s = launch_s(work.cluster, kind)
    forward_s = max(cost.forward_s + exposed[0], launched_s[0])
    return Times(
        forward_s=forward_s,
        backward_s=max(cost.backward_s + exposed[1] + again_s, launched_s[1]),
        recompute_s=forward_s,
        weight_gradient_s=cost.weight_gradient_s,
        exposed_s=sum(exposed),
        hidden_s=hidden_s,
    )


def _exposed_s(work: Work, parts: Mixture, layer: Cost) -> tuple[float, float]:
    """What is not hidden of the all-to-all, forward and backward."""
    moe, travel_s = work.experiment.moe, parts.travel_s
    assert moe is not None
    if moe.overlap_moe_expert_parallel_comm:
        # Under the other microbatch's other pass.
        return (
            exposed_s(work.cluster, travel_s, layer.backward_s),
            exposed_s(work.cluster, travel_s, layer.forward_s),
        )
    exposed = []
    for computed_s, shared_s in (
        (parts.local.forward_s, parts.shared.forward_s),
        (parts.local.backward_s, parts.shared.backward_s),
    ):
        rest_s = travel_s
        if moe.moe_shared_expert_overlap:
            rest_s = exposed_s(work.cluster, rest_s, shared_s)
        # The first part's way there and the last one's way back have nothing to hide under.
        others = 1 - 1 / moe.moe_overlap_degree
        exposed.append(rest_s * (1 - others) + exposed_s(work.cluster, rest_s * others, computed_s * others))
    return exposed[0], exposed[1]


def _norms(work: Work, count: int) -> Cost:
    elements = count * work.experiment.model.hidden_size * work.here
    return work.kernels.streamed(2 * elements, 3 * elements, count)


def _embedding(work: Work) -> Cost:
    """Looking up, and what makes the sum over TP ranks; the gradient is one of the whole table."""
    width, kernels = work.experiment.model.hidden_size, work.kernels
    elements = work.tokens * width
    table = padded_vocab_size(work.experiment) * width / work.tensor
    cost = kernels.streamed(2 * elements, 3 * elements, 3)
    cost += Cost(0.0, table * (kernels.gradient_bytes + work.size) / work.cluster.memory_rate)
    group, size = work.groups.tensor, elements * work.size
    return cost + Cost(reduce_scatter_s(work.cluster, group, size), all_gather_s(work.cluster, group, size))


def _head(work: Work) -> Cost:
    """Final norm, output layer, loss."""
    vocab_size = padded_vocab_size(work.experiment)
    logits = work.tokens * vocab_size / work.tensor
    forward, backward = _LOSS_BYTES
    loss = work.kernels.streamed(forward * logits / work.size, backward * logits / work.size, 10)
    return _norms(work, 1) + work.columns(work.experiment.model.hidden_size, vocab_size) + loss


def _mtp(work: Work) -> Times:
    """All multi-token-prediction layers: each looks up the next tokens, norms and joins them with the hidden
    state, passes a transformer layer and predicts."""
    experiment = work.experiment
    width = experiment.model.hidden_size
    layer = _layer(work, kind_of_mtp_layers(experiment))
    around = _embedding(work) + _norms(work, 2) + work.columns(2 * width, width) + _head(work)
    beside, count = _plain(around), experiment.model.mtp_num_layers
    return Times(
        forward_s=count * (layer.forward_s + beside.forward_s),
        backward_s=count * (layer.backward_s + beside.backward_s),
        recompute_s=count * layer.recompute_s,
        weight_gradient_s=count * (layer.weight_gradient_s + beside.weight_gradient_s),
        exposed_s=count * layer.exposed_s,
        hidden_s=count * layer.hidden_s,
    )


def _plain(cost: Cost) -> Times:
    """What experts have no part in, and what is never computed again."""
    return Times(cost.forward_s, cost.backward_s, 0.0, cost.weight_gradient_s, 0.0, 0.0)
