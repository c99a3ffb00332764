"""Rules about the sizes of the model."""

from __future__ import annotations

from megatron_moe.config.attention_rules import LATENT
from megatron_moe.config.defaults import divisors_of, nearest_multiples
from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import ETP, TP, Problems, divides, set_value
from megatron_moe.config.schema import Experiment


def heads_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds whole query heads."""
    yield from divides(
        "model.num_attention_heads", e.model.num_attention_heads, TP, e.parallel.tensor_model_parallel_size
    )


def query_groups_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds whole key and value heads, or as many ranks share each head."""
    groups, tp = set_value(e.model.num_query_groups), e.parallel.tensor_model_parallel_size
    if groups == e.model.num_attention_heads:  # heads_over_tp says it already
        return
    if e.model.multi_latent_attention is not None:  # attention_rules.keys_of_latent_attention does
        return
    key = "model.num_query_groups"
    if groups % tp and tp % groups:
        advice = f"use {nearest_multiples(groups, tp)}, or tensor_model_parallel_size {divisors_of(groups)}"
        yield Problem((key, TP), f"is neither a multiple nor a divisor of {TP}", advice)
    elif tp > groups and 2 * groups * set_value(e.model.kv_channels) % tp:
        text = f"times 2 x {key} is not divisible by {TP}, whose ranks share keys and values"
        advice = f"use a tensor_model_parallel_size of {divisors_of(groups)}"
        yield Problem(("model.kv_channels", key, TP), text, advice)


def heads_over_query_groups(e: Experiment) -> Problems:
    """Each key and value head serves the same number of query heads."""
    groups = set_value(e.model.num_query_groups)
    if e.model.multi_latent_attention is not None:  # attention_rules.keys_of_latent_attention says it
        return
    yield from divides(
        "model.num_attention_heads", e.model.num_attention_heads, "model.num_query_groups", groups
    )


def rope_needs_even_width(e: Experiment) -> Problems:
    """Rotary positions turn pairs of channels."""
    if (latent := e.model.multi_latent_attention) is not None:
        if (rotated := latent.qk_pos_emb_head_dim) % 2:
            key = f"{LATENT}.qk_pos_emb_head_dim"
            yield Problem((key,), "is rotated in pairs, and odd", f"use {nearest_multiples(rotated, 2)}")
        return
    width = int(set_value(e.model.kv_channels) * e.model.rotary_percent)
    if e.model.position_embedding_type == "rope" and (width % 2 or width == 0):
        keys = ("model.kv_channels", "model.rotary_percent")
        text = (
            f"times model.rotary_percent is {width} rotated channels a head, which must be even and above 0"
        )
        yield Problem(
            keys,
            text,
            f"set model.kv_channels to {set_value(e.model.kv_channels) + 1}, or another rotary_percent",
        )


def ffn_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds an equal part of a dense feed-forward layer, where there is one."""
    if e.moe is not None and all(moe_layers(e)):
        return
    yield from divides(
        "model.ffn_hidden_size", set_value(e.model.ffn_hidden_size), TP, e.parallel.tensor_model_parallel_size
    )


def padded_vocab_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds an equal part of the padded vocabulary."""
    unit, tp = e.model.make_vocab_size_divisible_by, e.parallel.tensor_model_parallel_size
    padded = -(-set_value(e.model.vocab_size) // unit) * unit
    if padded % tp:
        text = f"pads model.vocab_size to {padded}, which is not divisible by {TP}"
        yield Problem(
            ("model.make_vocab_size_divisible_by", "model.vocab_size", TP),
            text,
            f"use {nearest_multiples(unit, tp)}",
        )


def positions_reach_sequence(e: Experiment) -> Problems:
    """Every place of a sequence has a position."""
    if set_value(e.model.max_position_embeddings) < e.training.seq_length:
        keys = ("model.max_position_embeddings", "training.seq_length")
        yield Problem(
            keys, "is less than training.seq_length", f"use at least {e.training.seq_length}, or leave it out"
        )


def expert_ffn_over_etp(e: Experiment) -> Problems:
    """Each ETP rank holds an equal part of every expert."""
    if e.moe is not None:
        width, etp = set_value(e.moe.moe_ffn_hidden_size), set_value(e.parallel.expert_tensor_parallel_size)
        yield from divides("moe.moe_ffn_hidden_size", width, ETP, etp)


def shared_experts_over_tp(e: Experiment) -> Problems:
    """Shared experts are split over TP like a dense layer."""
    if e.moe is not None and e.moe.moe_shared_expert_intermediate_size is not None:
        key = "moe.moe_shared_expert_intermediate_size"
        yield from divides(
            key, e.moe.moe_shared_expert_intermediate_size, TP, e.parallel.tensor_model_parallel_size
        )


def biases_of_experts(e: Experiment) -> Problems:
    """Which experts can have biases: routed ones, over ETP with our blocks only, and no shared ones."""
    biases, shared = "model.mlp_bias", "moe.moe_shared_expert_intermediate_size"
    if e.moe is None or not e.model.mlp_bias:
        return
    if e.moe.moe_shared_expert_intermediate_size is not None:
        text = f"does not go with {shared}: Megatron-Core's shared experts have no biases"
        yield Problem((biases, shared), text, "leave one of the two out")
    etp = set_value(e.parallel.expert_tensor_parallel_size)
    if etp > 1 and e.model.spec == "transformer_engine":
        text = f"does not go with {ETP} and model.spec: Transformer Engine's experts would add them twice"
        yield Problem((biases, ETP, "model.spec"), text, f"set {ETP} to 1, or model.spec to native")
    yield from divides("model.hidden_size", e.model.hidden_size, ETP, etp)
