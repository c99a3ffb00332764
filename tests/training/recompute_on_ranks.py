"""Run on one rank: what a recomputed module saves, and whether it is computed again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_on_ranks import begin

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap


def counted(experiment: Experiment, folder: Path) -> tuple[Counter[str], int]:
    """How often each kind of module ran in one microbatch's forward and backward pass, and the bytes that the
    forward pass left for the backward pass, weights not counted."""
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from megatron_moe.model.attention import CoreAttention
    from megatron_moe.model.moe.experts import Experts
    from megatron_moe.model.moe.router import Router

    trainer = begin(experiment, folder)
    model = unwrap(trainer.chunks[0])
    calls: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: calls.update([name])

    for layer in model.decoder.layers:
        layer.input_layernorm.register_forward_hook(count("layernorm"))
        layer.pre_mlp_layernorm.register_forward_hook(count("layernorm"))
    # An MoE layer recomputes from within: what is called again begins with its router.
    kinds = {CoreAttention: "core_attn", Router: "moe", SharedExpertMLP: "shared_experts", MLP: "mlp"}
    for module in model.modules():
        if type(module) in kinds:
            module.register_forward_hook(count(kinds[type(module)]))
        if isinstance(module, Experts):
            activated = module._activated
            module._activated = lambda *args, f=activated: calls.update(["moe_act"]) or f(*args)  # type: ignore[method-assign]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    batch = next(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    # Only now: what was thrown away after its last use is gone.
    memory = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    for weight in model.parameters():
        memory.pop(weight.untyped_storage()._cdata, None)
    losses.mean().backward()
    return calls, sum(memory.values())
