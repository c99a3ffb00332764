"""Rules about attention: what its kinds do not have, what they need of layers and ranks."""

from __future__ import annotations

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import CP, SP, TP, Problems, set_value
from megatron_moe.config.schema import Experiment

LATENT = "model.multi_latent_attention"
_KEYS = {
    "qk_norm": "its narrow projections have norms always",
    "clip_qkv": "its narrow projections have norms always",
    "qkv_bias": "its projections have no biases",
    "attention_output_bias": "its projections have no biases",
    "rotary_scaling": "its own section yarn stretches positions",
}
"""Keys of the section `model` that do not go with it, and why."""
_FIELDS = {
    "qk_l2_norm": "its narrow projections have norms always",
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
    for name, why in _KEYS.items():
        if getattr(model, name):
            yield Problem((f"model.{name}",), f"does not go with {LATENT}: {why}", "leave it out")
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


def windows_of_layers(e: Experiment) -> Problems:
    """Which layers have a window is said of layers that there are, and of one at least."""
    key, window, layers = "model.window_attn_skip_freq", "model.sliding_window", e.model.num_layers
    which = e.model.window_attn_skip_freq
    if which is None:
        return
    if e.model.sliding_window is None:
        yield Problem((key, window), f"has no effect without {window}", "set that, or leave this out")
    elif isinstance(which, list) and len(which) != layers:
        text = f"has {len(which)} entries and not one for each of the model.num_layers"
        yield Problem(
            (key, "model.num_layers"), text, f"give it {layers} entries, 1 for a layer with a window"
        )
    elif which == 1 or (isinstance(which, list) and not any(which)):
        yield Problem((key, window), f"gives no layer {window}", f"leave {window} and this out")
    elif e.model.mtp_num_layers:
        mtp = "model.mtp_num_layers"
        text = f"does not say whether the layers of {mtp} have {window}"
        yield Problem((key, mtp), text, "leave one of the two out")


def norm_of_all_heads(e: Experiment) -> Problems:
    """Ranks share the weights of a norm over all heads by heads."""
    norm, groups = "model.qk_norm", "model.num_query_groups"
    if e.model.qk_norm != "all_heads":
        return
    if e.model.normalization != "RMSNorm":
        kind = "model.normalization"
        yield Problem((norm, kind), f"is an RMSNorm, and {kind} another", f"set {kind} to RMSNorm")
    count, tp = set_value(e.model.num_query_groups), e.parallel.tensor_model_parallel_size
    if tp > count and e.model.multi_latent_attention is None:
        text = f"all_heads needs whole heads of keys on each rank, and {TP} is more than {groups}"
        yield Problem((norm, TP, groups), text, f"use a tensor_model_parallel_size of at most {count}")


def attention_of_transformer_engine(e: Experiment) -> Problems:
    """What Transformer Engine's attention does not compute, or not in every layout."""
    if e.model.spec != "transformer_engine":
        return
    spec, native = "model.spec", "set model.spec to native, or leave this out"
    for key, is_set in (
        ("model.qk_norm", e.model.qk_norm == "all_heads"),
        ("model.clip_qkv", e.model.clip_qkv is not None),
    ):
        if is_set:
            yield Problem((key, spec), f"is not in the attention of {spec}", native)
    for key, is_set in (
        ("model.sliding_window", e.model.sliding_window is not None),
        ("model.attention_sinks", e.model.attention_sinks),
    ):
        if is_set and e.parallel.context_parallel_size > 1:
            text = f"does not go with {CP} in the attention of {spec}"
            yield Problem((key, CP, spec), text, "set model.spec to native, or use one context-parallel rank")
