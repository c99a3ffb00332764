"""Which layers hold experts."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment


def moe_layers(e: Experiment) -> list[bool]:
    """One entry a layer: whether it is MoE."""
    if e.moe is None:
        return [False] * e.model.num_layers
    every, dense = e.moe.moe_layer_freq, e.moe.moe_first_k_dense_layers
    if isinstance(every, list):
        return [bool(entry) for entry in every]
    return [layer >= dense and layer % every == 0 for layer in range(e.model.num_layers)]
