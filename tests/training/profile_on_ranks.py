"""Functions that tests of `profile` run on rank processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.training import profile, profile_session


def measured(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """What `profile` finds, in few steps."""
    profile_session.WARM_UP, profile_session.REPETITIONS = 1, 2
    return profile.measure(folder, experiment)


def saved_by_layers(experiment: Experiment, folder: Path) -> list[int]:
    """Bytes that autograd saves in each layer of a microbatch's forward pass: memory that is shared counts
    once, and weights not at all."""
    session = profile_session.Session(experiment, folder)
    chunk = session.trainer.chunks[0]
    weights = {weight.untyped_storage().data_ptr() for weight in chunk.parameters()}
    seen: set[int] = set()
    sizes: list[int] = []
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if sizes and storage.data_ptr() not in weights | seen:
            seen.add(storage.data_ptr())
            held.append(tensor)  # so that no other tensor takes its place
            sizes[-1] += storage.nbytes()
        return tensor

    layers: Any = unwrap(chunk).decoder.layers  # type: ignore[union-attr]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: sizes.append(0))
    layers[-1].register_forward_hook(lambda *_: sizes.append(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        from megatron_moe.training.forward import forward_step

        batches = session.trainer.iterators(session._batches, session.trainer.shapes())[0]
        output, _ = forward_step(batches, chunk)
    assert output.requires_grad
    return sizes[:-1]
