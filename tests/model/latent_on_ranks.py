"""Run on ranks: multi-latent attention of a model that the trainer builds, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import sharded_weights
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan as plans


def attention(experiment: Experiment, hidden: Tensor, upstream: Tensor) -> dict[str, Any]:
    """The first layer's attention: `output` [s, b, h], the gradients of the `input` and of `weights`, by the
    names that these have in the layer; and their `values`.

    Args:
        hidden: [s, b, h] float64.
        upstream: the same, gradient of the output.
    """
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, experiment.training.seed, timeout_s=60)
    chunk: Any = build_chunks(experiment, plan, torch.float32)[0]
    layer = chunk.decoder.layers[0].self_attention.double()
    # Norms are 1 in the beginning, and would hide that one is left out.
    generator = torch.Generator().manual_seed(3)
    for weight in layer.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    hidden = hidden.clone().requires_grad_()
    output, bias = layer(hidden, None)
    assert bias is None
    output.backward(upstream)
    named = dict(layer.named_parameters())
    return {
        "output": output.detach(),
        "input": hidden.grad,
        "weights": {name: weight.grad for name, weight in named.items()},
        "values": {name: weight.detach() for name, weight in named.items()},
    }


def names_in_checkpoint(experiment: Experiment) -> list[str]:
    """Of the weights of this rank."""
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, experiment.training.seed, timeout_s=60)
    return sorted(tensor.key for tensor in sharded_weights(build_chunks(experiment, plan, torch.float32)))
