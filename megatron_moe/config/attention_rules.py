"""Rules about multi-latent attention: which other keys say something of attention that it does not have."""

from __future__ import annotations

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import SP, TP, Problems, set_value
from megatron_moe.config.schema import Experiment

LATENT = "model.multi_latent_attention"
_FIELDS = {
    "qk_layernorm": "its narrow projections have norms always",
    "qk_l2_norm": "its narrow projections have norms always",
    "add_qkv_bias": "its projections have no biases",
    "add_bias_linear": "its projections have no biases",
    "rotary_interleaved": "it turns neighbouring channels always",
    "no_rope_freq": "Megatron-Core gives positions to all its layers",
}
"""Fields of `model.megatron_core` that do not go with it, and why."""


def keys_of_latent_attention(e: Experiment) -> Problems:
    """Its section says the width of its heads, of which there are as many keys and values as queries."""
    model, latent = e.model, e.model.multi_latent_attention
    if latent is None:
        return
    channels, parts = "model.kv_channels", f"{LATENT}.qk_head_dim plus qk_pos_emb_head_dim"
    width = latent.qk_head_dim + latent.qk_pos_emb_head_dim
    if set_value(model.kv_channels) != width:
        text = f"is not {width}, {parts}, which say the width of a head of queries and keys"
        yield Problem((channels,), text, "leave it out")
    groups, heads = "model.num_query_groups", "model.num_attention_heads"
    if set_value(model.num_query_groups) != model.num_attention_heads:
        text = f"is not {heads}, and {LATENT} has keys and values for each head"
        yield Problem((groups, heads), text, f"leave it out, or leave out {LATENT}")
    if model.position_embedding_type != "rope":
        key = "model.position_embedding_type"
        yield Problem((key,), f"does not go with {LATENT}, whose heads have a rotated part", "set it to rope")
    if model.rotary_percent != 1.0:
        text = f"does not go with {LATENT}, of whose heads qk_pos_emb_head_dim channels are rotated"
        yield Problem(("model.rotary_percent",), text, "leave it out, and set that")
    for field, why in _FIELDS.items():
        if field in model.megatron_core:
            text = f"does not go with {LATENT}: {why}"
            yield Problem((f"model.megatron_core.{field}",), text, "leave it out")


def latent_attention_can_be_built(e: Experiment) -> Problems:
    """What Megatron-Core computes wrongly or differently in its versions."""
    latent, spec = e.model.multi_latent_attention, "model.spec"
    if latent is None:
        return
    if e.parallel.tensor_model_parallel_size > 1 and not e.parallel.sequence_parallel:
        text = f"does not go with {LATENT} and {TP} above 1: what ranks share of the keys would learn from "
        yield Problem((SP, TP), f"{text}a part of the heads only", "set it to true, or leave it out")
    if latent.q_lora_rank is None and e.model.spec == "transformer_engine":
        text = f"needs {LATENT}.q_lora_rank: without it versions of Megatron-Core build different models"
        yield Problem((spec,), text, f"set that, or {spec} to native")
    if latent.yarn is None and e.model.apply_rope_fusion:
        text = f"needs {LATENT}.yarn: Megatron-Core has no kernel for plain positions here"
        yield Problem(("model.apply_rope_fusion",), text, "leave it out, or add that section")
