"""Rules about fields of Megatron-Core under `model.megatron_core` that need each other, or keys of ours.

Megatron-Core refuses some of these combinations when a rank builds its model, and passes over others without
a word.
"""

from __future__ import annotations

from megatron_moe.config.defaults import divisors_of
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems, set_value
from megatron_moe.config.schema import Experiment

_PREFIX = "model.megatron_core."


def rotary_options(e: Experiment) -> Problems:
    """Options of rotary positions need those, and a pattern of layers fits the layers."""
    fields, kind, layers = e.model.megatron_core, "model.position_embedding_type", e.model.num_layers
    for name in ("rotary_interleaved", "no_rope_freq"):
        if fields.get(name) and e.model.position_embedding_type != "rope":
            text = f"has no effect on positions other than rope in {kind}"
            yield Problem((_PREFIX + name, kind), text, f"set {kind} to rope, or leave this out")
    key, every = f"{_PREFIX}no_rope_freq", fields.get("no_rope_freq")
    if isinstance(every, list) and len(every) != layers:
        text = f"has {len(every)} entries and not one for each of the model.num_layers"
        yield Problem(
            (key, "model.num_layers"), text, f"give it {layers} entries, 1 for a layer without rope"
        )
    elif isinstance(every, int) and every and (every < 0 or layers % every):
        yield Problem(
            (key, "model.num_layers"), "does not divide model.num_layers", f"use {divisors_of(layers)}"
        )


def one_norm_of_queries(e: Experiment) -> Problems:
    """Queries and keys have one norm."""
    keys = ("model.qk_norm", f"{_PREFIX}qk_l2_norm")
    if e.model.qk_norm is not None and e.model.megatron_core.get("qk_l2_norm"):
        yield Problem(keys, f"has no effect beside {keys[1]}", "leave one of the two out")


def biases_of_recomputed_layers(e: Experiment) -> Problems:
    """Megatron-Core returns a dense layer's second bias from the recomputed part, as if it were computed
    there: autograd then goes round in a circle (seen with 0.16.1)."""
    biases, modules = "model.mlp_bias", "recompute.modules"
    if e.model.mlp_bias and "mlp" in set_value(e.recompute.modules):
        text = f"does not go with mlp in {modules}: the backward pass of Megatron-Core does not end"
        yield Problem((biases, modules), text, "recompute other modules, or whole layers")
