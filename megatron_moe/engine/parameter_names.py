"""What a checkpoint calls the parameters of a model chunk."""

from __future__ import annotations

import re
from typing import Any

import torch

from megatron_moe.engine.checkpoint import metadata, sharded_tensors, unwrap
from megatron_moe.engine.weights import name_of


def checkpoint_names(chunk: torch.nn.Module) -> dict[str, str]:
    """Each parameter's name in the chunk -> its name in the model, layers counted over the whole model, and
    all experts of a layer under one name: `decoder.layers.3.mlp.experts.linear_fc1.weight`."""
    model = unwrap(chunk)
    state: dict[str, Any] = model.sharded_state_dict(metadata=metadata())  # type: ignore[operator]
    names = {}
    for name, _ in model.named_parameters():
        tensor = sharded_tensors({name: state[name]})[0]
        names[name] = re.sub(r"\.experts\.\d+\.", ".experts.", name_of(tensor.key, tensor.global_offset))
    return names
