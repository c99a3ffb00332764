"""What a rank holds of each piece from the first step to the last: weights, gradients, optimizer.

Megatron-Core keeps the weights and gradients of a model chunk in two buffers each, one for the experts. Every
tensor in them begins at a multiple of 64 elements, which is counted; each buffer ends at a multiple of 128
and of its replicas, which is not: it is a few hundred kilobytes on a thousand ranks. The optimizer's share of
a rank is an equal part of what its replicas hold together.
"""

from __future__ import annotations

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.activations import activations
from megatron_moe.plan.costs.parameters import padded_vocab_size
from megatron_moe.plan.costs.precision import element_size
from megatron_moe.plan.costs.trained import Trained
from megatron_moe.plan.costs.weight import Weights
from megatron_moe.plan.costs.weights import on_a_rank, shared_word_embedding, weights_of
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.units import Kind, StaticBytes

__all__ = ["activations", "shared_embedding", "static_bytes"]

_ALIGNED = 64
"""Elements (`_ParamAndGradBuffer`, Megatron-Core 0.16.1 and 0.19.2)."""

_STATE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


def static_bytes(experiment: Experiment, layout: Layout, kind: Kind) -> StaticBytes:
    """Of one piece on one rank, for `mtp` without its copy of the embedding."""
    weights = weights_of(experiment, kind, padded_vocab_size(experiment))
    return _bytes_of(weights, experiment, layout, kind)


def shared_embedding(experiment: Experiment, layout: Layout) -> StaticBytes:
    """The copy of the embedding that multiplies on the last stage, where that is not the first; none where
    the output layer has weights of its own."""
    if experiment.model.untie_embeddings_and_output_weights:
        return StaticBytes(0, 0, 0)
    weights = [shared_word_embedding(experiment, padded_vocab_size(experiment))]
    return _bytes_of(weights, experiment, layout, "embedding")


def _bytes_of(weights: list[Weights], experiment: Experiment, layout: Layout, kind: Kind) -> StaticBytes:
    """Gradients and states are those of trained weights alone."""
    trained = Trained.of(experiment)
    held = dense = experts = 0
    for weight in weights:
        count = -(-on_a_rank(weight, layout) // _ALIGNED) * _ALIGNED
        held += count
        if not trained.holds(kind, weight):
            continue
        if weight.split == "expert":
            experts += count
        else:
            dense += count
    size = element_size(experiment)
    replicas = layout.data_parallel_size * layout.context_parallel_size
    sharded = dense / replicas + experts / layout.expert_data_parallel_size
    of_gradient = 4 if experiment.parallel.grad_reduce_in_fp32 else size
    gradients = (dense + experts) * of_gradient
    return StaticBytes(held * size, gradients, sharded * _state_size(experiment, size))


def _state_size(experiment: Experiment, element: int) -> float:
    """Bytes of the optimizer's state a weight, on the device: both moments, and beside weights in bf16
    masters in fp32."""
    settings = experiment.optimizer
    if settings.use_precision_aware_optimizer:
        moments = _STATE_BYTES[settings.exp_avg_dtype] + _STATE_BYTES[settings.exp_avg_sq_dtype]
        # Of a master beside bf16, Transformer Engine keeps the 16 bits that the weight lacks.
        return moments + (2 if element == 2 else 0)
    on_device = 1 - settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 1.0
    return on_device * (12 if element == 2 else 8)
