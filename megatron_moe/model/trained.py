"""Which of a model's weights are trained: all, but for `training.freeze` and `training.lora`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.freezing import is_adapter, is_frozen
from megatron_moe.config.schema import Experiment
from megatron_moe.engine.parameter_names import checkpoint_names
from megatron_moe.model import lora_places
from megatron_moe.model.lora import adapters_in


def choose(chunk: torch.nn.Module, experiment: Experiment) -> None:
    """Take the gradients away from what stays as it is, in a GPTModel that is not wrapped yet.

    Frozen weights are in no gradient buffer and have no state in the optimizer. Collective over the ranks.
    """
    training = experiment.training
    if training.lora is not None:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if training.lora.dropout:
            _let_adapters_know_places(chunk)
    elif training.freeze is not None:
        names = checkpoint_names(chunk)
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not is_frozen(training.freeze, names[name]))
    else:
        return
    moe = experiment.moe
    takes_layers_apart = moe is not None and moe.overlap_moe_expert_parallel_comm
    if experiment.recompute.granularity != "none" or takes_layers_apart:
        _let_gradients_reach_the_beginning(chunk)


def _let_gradients_reach_the_beginning(chunk: torch.nn.Module) -> None:
    """Megatron-Core's checkpointed functions run a second time, in which weights get gradients and routers
    count, only where their input has a gradient, which a frozen embedding's has not. And its schedule of two
    microbatches calls for the backward pass of the embedding itself."""
    embedding: Any = getattr(chunk, "embedding", None)
    if embedding is not None and not any(parameter.requires_grad for parameter in embedding.parameters()):
        embedding.register_forward_hook(_with_gradient)


def _with_gradient(embedding: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _let_adapters_know_places(chunk: torch.nn.Module) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import TransformerLayer

    config: Any = chunk.config
    group = parallel_state.get_tensor_model_parallel_group() if config.sequence_parallel else None
    for layer in chunk.modules():
        if isinstance(layer, TransformerLayer):
            adapters = []
            for name, adapter in adapters_in(layer):
                adapter.purpose = f"{layer.layer_number}.{name}"
                adapters.append(adapter)
            lora_places.follow(layer, adapters, group)
