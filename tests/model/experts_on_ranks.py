"""Run on ranks: our experts beside Megatron-Core's SequentialMLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import save_weights
from megatron_moe.engine.versions import moe_submodules, repair_missing_transformer_engine
from megatron_moe.model import gpt
from megatron_moe.model.moe.experts import Experts, ExpertSettings
from megatron_moe.plan import plan as plans


def compute(
    activation: str,
    tokens: Tensor,
    probs: Tensor,
    sizes: list[int],
    fc1: Tensor,
    fc2: Tensor,
    biases: list[Tensor],
    upstream: Tensor,
) -> list[Tensor]:
    """Output, and gradients of tokens, gate weights, both weights and the biases if there are any, of experts
    in one process."""
    settings = ExpertSettings(
        tokens.size(1), fc2.size(2), activation, has_bias=bool(biases), dtype=tokens.dtype
    )
    experts = Experts(len(sizes), settings)
    experts.linear_fc1.data, experts.linear_fc2.data = fc1, fc2
    parameters = [experts.linear_fc1, experts.linear_fc2]
    if biases:
        experts.bias_fc1.bias.data, experts.bias_fc2.bias.data = biases
        parameters += [experts.bias_fc1.bias, experts.bias_fc2.bias]
    leaves = [tokens.clone().requires_grad_(), probs.clone().requires_grad_()]
    output, bias = experts(leaves[0], torch.tensor(sizes), leaves[1])
    assert bias is None
    output.backward(upstream)
    return [output.detach(), *(x.grad for x in (*leaves, *parameters))]


def dropped(experiment: Experiment) -> tuple[Tensor, bool]:
    """What dropout leaves of [64, f] ones in this rank's first experts, and whether the default random state
    stayed as it was."""
    groups.initialize_model_parallel(plans.make(experiment).layout, seed=1, timeout_s=60)
    experts = next(x for x in chunk(experiment, sequential=False).modules() if isinstance(x, Experts))
    before = torch.get_rng_state()
    left = experts._survivors(torch.ones(64, experts.linear_fc1.size(1)))
    assert left is not None
    return left, torch.equal(before, torch.get_rng_state())


def with_sequential_experts() -> Any:
    """Megatron-Core's own experts in our layers, while the context holds."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def stock(moe: Any, lora: Any) -> Any:
        theirs = get_gpt_layer_local_spec(num_experts=moe.num_moe_experts, normalization="RMSNorm")
        return moe_submodules(theirs.submodules.mlp).experts

    return mock.patch("megatron_moe.model.moe.megatron.experts_class", stock)


def chunk(experiment: Experiment, sequential: bool) -> torch.nn.Module:
    """This rank's only model chunk; the parallel state must be there."""
    repair_missing_transformer_engine()
    plan = plans.make(experiment)
    if not sequential:
        return gpt.build_chunks(experiment, plan, torch.float32)[0]
    with with_sequential_experts():
        return gpt.build_chunks(experiment, plan, torch.float32)[0]


def shards(experiment: Experiment, sequential: bool) -> list[tuple[Any, ...]]:
    """What this rank puts into a checkpoint of the routed experts, expert by expert: (key, global shape,
    where each expert's piece begins, its shape, its replica)."""
    from megatron_moe.engine.checkpoint import sharded_weights

    groups.initialize_model_parallel(plans.make(experiment).layout, seed=1, timeout_s=60)
    found = []
    for tensor in sharded_weights([chunk(experiment, sequential)]):
        if ".mlp.experts." not in tensor.key:
            continue
        axis = len(tensor.global_shape) - (3 if tensor.key.endswith("weight") else 2)
        offset, shape = list(tensor.global_offset), list(tensor.local_shape)
        shape = [1] * (len(offset) - len(shape)) + shape
        for expert in range(shape[axis]):
            begin = [*offset[:axis], offset[axis] + expert, *offset[axis + 1 :]]
            size = [*shape[:axis], 1, *shape[axis + 1 :]]
            found.append(
                (tensor.key, tuple(tensor.global_shape), tuple(begin), tuple(size), tensor.replica_id)
            )
    return sorted(found)


@torch.no_grad()
def _draw_biases(model: torch.nn.Module) -> None:
    """Give the experts' biases, which start as zeros, values of their own."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for name, parameter in model.named_parameters():
        if ".experts." in name and name.endswith(".bias"):
            parameter.normal_(generator=generator)


def exchanged(
    experiment: Experiment, folder: str, from_sequential: bool, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the model that was saved, and of the one with the other kind of experts that loaded it."""
    from megatron.core import dist_checkpointing

    groups.initialize_model_parallel(plans.make(experiment).layout, seed=1, timeout_s=60)
    logits = []
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    for sequential in (from_sequential, not from_sequential):
        model = chunk(experiment, sequential)
        if not logits:
            _draw_biases(model)
            save_weights(Path(folder), [model])
        else:
            for parameter in model.parameters():
                parameter.data.fill_(7.0)
            # SequentialMLP also names places for Transformer Engine's scaling factors, and keeps nothing
            # there.
            state = model.sharded_state_dict()
            state = {
                key: value for key, value in state.items() if ".experts." not in key or "_extra" not in key
            }
            model.load_state_dict(dist_checkpointing.load({"model": state}, folder)["model"], strict=False)
        model.eval()
        with torch.no_grad():
            logits.append(model(tokens, positions, None))
    return logits[0], logits[1]
