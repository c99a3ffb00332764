"""What comes behind the pipeline in each iteration: gradients over the replicas, the update, updated weights.

The optimizer's state is spread over the replicas (ZeRO-1), so that gradients are reduced and scattered, and
updated weights gathered. What overlaps goes on under the backward pass of the last microbatch, and under the
forward pass of the next iteration's first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.parameters import padded_vocab_size
from megatron_moe.plan.costs.precision import element_size
from megatron_moe.plan.costs.trained import Trained
from megatron_moe.plan.costs.weights import on_a_rank, shared_word_embedding, weights_of
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.stages import Stage
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.times.collectives import (
    Group,
    Groups,
    all_gather_s,
    all_reduce_s,
    exposed_s,
    group,
    reduce_scatter_s,
)
from megatron_moe.plan.units import Kind

_UPDATE_BYTES = 28 + 12
"""Of a weight that a rank updates: gradient read, master and both moments read and written, all in float32;
the gradient's norm taken, and the gradient clipped."""
_HOST_LINK_RATE = 25e9
"""PCI Express 4.0 or 5.0 x16 as copies reach it, bytes a second: gradients to an optimizer in the host's
memory and weights back."""
_HOST_MEMORY_RATE = 25e9
"""A GPU's share of its host's memory, for the update there."""


def after_pipeline(
    experiment: Experiment,
    layout: Layout,
    cluster: Cluster,
    stages: Sequence[Stage],
    forward_s: float = 0.0,
    backward_s: float = 0.0,
) -> tuple[float, float]:
    """`after_pieces` of the stages that one pipeline rank holds."""
    return after_pieces(experiment, layout, cluster, pieces_on(stages), forward_s, backward_s)


def pieces_on(stages: Sequence[Stage]) -> Counter[Kind]:
    """How many pieces of each kind these stages hold."""
    pieces: Counter[Kind] = Counter()
    for stage in stages:
        pieces["moe"] += len(stage.moe_layers)
        pieces["dense"] += len(stage.layers) - len(stage.moe_layers)
        pieces["embedding"] += stage.has_embedding
        pieces["mtp"] += stage.num_mtp_layers > 0
        pieces["head"] += stage.has_loss
    return pieces


def after_pieces(
    experiment: Experiment,
    layout: Layout,
    cluster: Cluster,
    pieces: Mapping[Kind, float],
    forward_s: float = 0.0,
    backward_s: float = 0.0,
) -> tuple[float, float]:
    """Seconds of gradients and gathered weights that nothing hides, and of the update.

    Args:
        pieces: how many of each kind a rank holds.
        forward_s, backward_s: of one microbatch through all of them, which hide what overlaps.
    """
    dense, expert = _held(experiment, layout, pieces)
    groups, parallel = Groups(layout, cluster.gpus_per_node), experiment.parallel
    size = element_size(experiment)
    of_gradient = 4 if parallel.grad_reduce_in_fp32 else size
    reduce_s = gather_s = 0.0
    for count, replicas in ((dense, groups.replicas), (expert, groups.expert_replicas)):
        reduce_s += reduce_scatter_s(cluster, replicas, count * of_gradient)
        gather_s += all_gather_s(cluster, replicas, count * size)
    if parallel.overlap_grad_reduce:
        reduce_s = exposed_s(cluster, reduce_s, backward_s)
    if parallel.overlap_param_gather:
        gather_s = exposed_s(cluster, gather_s, forward_s)
    if pieces.get("embedding") or pieces.get("head"):
        reduce_s += _tied_embedding_s(experiment, layout, cluster, of_gradient)
    update_s = _update_s(experiment, cluster, dense, groups.replicas, size)
    update_s += _update_s(experiment, cluster, expert, groups.expert_replicas, size)
    return reduce_s + gather_s, update_s


def updated_parameters(
    experiment: Experiment, layout: Layout, cluster: Cluster, pieces: Mapping[Kind, float]
) -> float:
    """Weights that a rank's share of the optimizer updates."""
    dense, expert = _held(experiment, layout, pieces)
    groups = Groups(layout, cluster.gpus_per_node)
    return dense / groups.replicas.size + expert / groups.expert_replicas.size


def _held(experiment: Experiment, layout: Layout, pieces: Mapping[Kind, float]) -> tuple[float, float]:
    """Weights on a rank that are trained, dense and of experts."""
    dense = expert = 0.0
    trained = Trained.of(experiment)
    for kind, count in pieces.items():
        if not count:
            continue
        for weight in weights_of(experiment, kind, padded_vocab_size(experiment)):
            if not trained.holds(kind, weight):
                continue
            if weight.split == "expert":
                expert += count * on_a_rank(weight, layout)
            else:
                dense += count * on_a_rank(weight, layout)
    return dense, expert


def _tied_embedding_s(experiment: Experiment, layout: Layout, cluster: Cluster, of_gradient: int) -> float:
    """Where the output layer is the embedding, the first and the last stage sum their gradients of it."""
    stages = layout.pipeline_model_parallel_size
    weight = shared_word_embedding(experiment, padded_vocab_size(experiment))
    if experiment.model.untie_embeddings_and_output_weights or stages == 1:
        return 0.0
    if not Trained.of(experiment).holds("embedding", weight):
        return 0.0
    table = on_a_rank(weight, layout)
    apart = layout.world_size // stages * (stages - 1)
    both = group(2, apart, cluster.gpus_per_node, layout.world_size)
    return all_reduce_s(cluster, both, table * of_gradient)


def _update_s(experiment: Experiment, cluster: Cluster, count: float, replicas: Group, size: int) -> float:
    """Of this rank's share of so many weights."""
    share = count / replicas.size
    optimizer = experiment.optimizer
    in_host = optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0
    here_s = share * (1 - in_host) * (_UPDATE_BYTES + size) / cluster.memory_rate
    there_s = share * in_host * ((4 + size) / _HOST_LINK_RATE + _UPDATE_BYTES / _HOST_MEMORY_RATE)
    return here_s + there_s
