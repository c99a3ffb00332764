"""Which layers see a part of the sequence only."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment


def layers_with_window(e: Experiment) -> list[bool]:
    """One entry a layer: whether it has model.sliding_window."""
    layers, which = e.model.num_layers, e.model.window_attn_skip_freq
    if e.model.sliding_window is None:
        return [False] * layers
    if isinstance(which, list):
        return [bool(entry) for entry in which]
    return [which is None or (layer + 1) % which != 0 for layer in range(layers)]
