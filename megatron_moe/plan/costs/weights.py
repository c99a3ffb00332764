"""The weights of each kind of piece: the table from which parameters, FLOPs and bytes follow.

Each entry says how much of it a token passes, and over which ranks it is split.
"""

from __future__ import annotations

from typing import Literal

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.model import MultiLatentAttention
from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan.costs.adapters import adapters_of
from megatron_moe.plan.costs.weight import Split, Weights, first_width
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.units import Kind


def weights_of(experiment: Experiment, kind: Kind, vocab_size: int) -> list[Weights]:
    """The weights of one piece, adapters included, for `mtp` those of all multi-token-prediction layers.

    Args:
        vocab_size: as given, or padded.
    """
    if kind == "embedding":
        return _embedding(experiment, vocab_size)
    if kind == "head":
        return _output(experiment, vocab_size)
    if kind == "mtp":
        return _mtp_layer(experiment) * experiment.model.mtp_num_layers
    return _layer(experiment, kind)


def shared_word_embedding(experiment: Experiment, vocab_size: int) -> Weights:
    """The word embedding where another stage than the first holds it, too."""
    return _vector("embedding.word_embeddings.weight", vocab_size * experiment.model.hidden_size, "tensor")


def on_a_rank(weights: Weights, layout: Layout) -> int:
    """How many of them one rank holds."""
    if weights.split == "no":
        return weights.total
    if weights.split == "tensor":
        return weights.total // layout.tensor_model_parallel_size
    return weights.total // (layout.expert_model_parallel_size * layout.expert_tensor_parallel_size)


def kind_of_mtp_layers(experiment: Experiment) -> Literal["dense", "moe"]:
    """Of the transformer layer in each multi-token-prediction layer: that of the model's last layer."""
    return "moe" if moe_layers(experiment)[-1] else "dense"


def _matrix(name: str, size: int, split: Split = "tensor") -> Weights:
    return Weights(size, size, size, split, name)


def _vector(name: str, size: int, split: Split = "no") -> Weights:
    return Weights(size, size, 0, split, name)


def _norm(experiment: Experiment, name: str, width: int) -> list[Weights]:
    """`name` with what its weight and, in a LayerNorm, its bias are called behind it."""
    parts = ("weight",) if experiment.model.normalization == "RMSNorm" else ("weight", "bias")
    return [_vector(f"{name}{part}", width) for part in parts]


def _embedding(experiment: Experiment, vocab_size: int) -> list[Weights]:
    """Token and position embeddings: looked up, not multiplied."""
    model = experiment.model
    weights = [shared_word_embedding(experiment, vocab_size)]
    if model.position_embedding_type == "learned_absolute":
        assert model.max_position_embeddings is not None
        size = model.max_position_embeddings * model.hidden_size
        weights.append(_vector("embedding.position_embeddings.weight", size))
    return weights


def _output(experiment: Experiment, vocab_size: int) -> list[Weights]:
    """Final norm and output layer. A tied one multiplies by the embedding, and adds no parameters."""
    size = vocab_size * experiment.model.hidden_size
    own = size if experiment.model.untie_embeddings_and_output_weights else 0
    norm = _norm(experiment, "decoder.final_layernorm.", experiment.model.hidden_size)
    return [*norm, Weights(own, own, size, "tensor", "output_layer.weight")]


def _mtp_layer(experiment: Experiment) -> list[Weights]:
    """As Megatron-Core's MultiTokenPredictionLayer (DeepSeek-V3, section 2.2): norms of the embedding and of
    the hidden state, a projection of both together, a transformer layer, a final norm. Embedding and output
    layer are the model's."""
    width = experiment.model.hidden_size
    names = ("enorm.", "hnorm.", "final_layernorm.")
    norms = [part for name in names for part in _norm(experiment, name, width)]
    layer = [
        weight._replace(name=f"transformer_layer.{weight.name}")
        for weight in _layer(experiment, kind_of_mtp_layers(experiment))
    ]
    return [*norms, _matrix("eh_proj.weight", 2 * width * width), *layer]


def _layer(experiment: Experiment, kind: Literal["dense", "moe"]) -> list[Weights]:
    model = experiment.model
    # As Transformer Engine fuses them with what is behind them.
    first = (
        "self_attention.linear_qkv.layer_norm_"
        if model.multi_latent_attention is None
        else "input_layernorm."
    )
    second = "pre_mlp_layernorm." if kind == "moe" else "mlp.linear_fc1.layer_norm_"
    norms = [part for name in (first, second) for part in _norm(experiment, name, model.hidden_size)]
    if kind == "moe":
        return [*norms, *attention_weights(experiment), *_mixture(experiment), *adapters_of(experiment, kind)]
    assert model.ffn_hidden_size is not None
    feed_forward = _feed_forward(experiment, "mlp", model.ffn_hidden_size)
    return [*norms, *attention_weights(experiment), *feed_forward, *adapters_of(experiment, kind)]


def attention_weights(experiment: Experiment) -> list[Weights]:
    """Those of `weights_of` a layer that are its attention's."""
    model, latent = experiment.model, experiment.model.multi_latent_attention
    weights = _attention(experiment) if latent is None else _latent_attention(experiment, latent)
    if model.attention_sinks:
        name = "self_attention.core_attention.softmax_offset"
        weights.append(_vector(name, model.num_attention_heads, split="tensor"))
    return weights


def _attention(experiment: Experiment) -> list[Weights]:
    """Query, key, value and output projections; key and value have num_query_groups heads."""
    model = experiment.model
    assert model.num_query_groups is not None and model.kv_channels is not None
    query_width = model.num_attention_heads * model.kv_channels
    qkv_width = query_width + 2 * model.num_query_groups * model.kv_channels
    at = "self_attention"
    weights = [
        _matrix(f"{at}.linear_qkv.weight", model.hidden_size * qkv_width),
        _matrix(f"{at}.linear_proj.weight", query_width * model.hidden_size),
    ]
    if model.qkv_bias:
        weights.append(_vector(f"{at}.linear_qkv.bias", qkv_width, split="tensor"))
    if model.attention_output_bias:
        weights.append(_vector(f"{at}.linear_proj.bias", model.hidden_size))
    if model.qk_norm == "all_heads":
        keys = model.num_query_groups * model.kv_channels
        weights.append(_vector(f"{at}.q_layernorm.weight", query_width, split="tensor"))
        weights.append(_vector(f"{at}.k_layernorm.weight", keys, split="tensor"))
    if model.qk_norm == "head":
        weights += _norm(experiment, f"{at}.q_layernorm.", model.kv_channels)
        weights += _norm(experiment, f"{at}.k_layernorm.", model.kv_channels)
    return weights


def _latent_attention(experiment: Experiment, latent: MultiLatentAttention) -> list[Weights]:
    """As Megatron-Core's MLASelfAttention (DeepSeek-V2, section 2.1): down to narrow widths, a norm there, up
    to all heads. The one rotated key of all heads comes out of the way down."""
    model = experiment.model
    width, heads, at = model.hidden_size, model.num_attention_heads, "self_attention"
    query_width = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    down: Split = "no"  # each tensor-parallel rank holds what leads down whole (`model.latent_attention`)
    if latent.q_lora_rank is None:
        weights = [_matrix(f"{at}.linear_q_proj.weight", width * query_width)]
    else:
        weights = [
            _matrix(f"{at}.linear_q_down_proj.weight", width * latent.q_lora_rank, split=down),
            *_norm(experiment, f"{at}.linear_q_up_proj.layer_norm_", latent.q_lora_rank),
            _matrix(f"{at}.linear_q_up_proj.weight", latent.q_lora_rank * query_width),
        ]
    narrow = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    of_heads = heads * (latent.qk_head_dim + latent.v_head_dim)
    weights += [
        _matrix(f"{at}.linear_kv_down_proj.weight", width * narrow, split=down),
        *_norm(experiment, f"{at}.linear_kv_up_proj.layer_norm_", latent.kv_lora_rank),
        _matrix(f"{at}.linear_kv_up_proj.weight", latent.kv_lora_rank * of_heads),
        _matrix(f"{at}.linear_proj.weight", heads * latent.v_head_dim * width),
    ]
    return weights


def _feed_forward(experiment: Experiment, at: str, inner_width: int) -> list[Weights]:
    hidden_size = experiment.model.hidden_size
    columns = first_width(experiment.model.activation, inner_width)
    weights = [
        _matrix(f"{at}.linear_fc1.weight", hidden_size * columns),
        _matrix(f"{at}.linear_fc2.weight", inner_width * hidden_size),
    ]
    if experiment.model.mlp_bias:
        weights += [
            _vector(f"{at}.linear_fc1.bias", columns, split="tensor"),
            _vector(f"{at}.linear_fc2.bias", hidden_size),
        ]
    return weights


def _mixture(experiment: Experiment) -> list[Weights]:
    """Router, experts and shared experts of one layer."""
    moe, hidden_size = experiment.moe, experiment.model.hidden_size
    assert moe is not None and moe.moe_ffn_hidden_size is not None and moe.moe_expert_activation is not None
    inner_width = moe.moe_ffn_hidden_size
    columns = first_width(moe.moe_expert_activation, inner_width)
    # The gate `hash` has no weights, and learnt noise a matrix of its own.
    routers = {"hash": (), "noisy_topk": ("weight", "gate.noise_weight")}.get(
        moe.moe_router_gate, ("weight",)
    )
    weights = [
        _matrix(f"mlp.router.{name}", hidden_size * moe.num_moe_experts, split="no") for name in routers
    ]
    if moe.moe_router_bias:
        weights.append(_vector("mlp.router.bias", moe.num_moe_experts))
    weights += [
        _of_experts(moe, "linear_fc1.weight", hidden_size * columns),
        _of_experts(moe, "linear_fc2.weight", inner_width * hidden_size),
    ]
    if experiment.model.mlp_bias:
        weights += [
            _of_experts(moe, "linear_fc1.bias", columns, is_matrix=False),
            _of_experts(moe, "linear_fc2.bias", hidden_size, is_matrix=False),
        ]
    if moe.moe_shared_expert_intermediate_size is not None:
        at = "mlp.shared_experts"
        weights += _feed_forward(experiment, at, moe.moe_shared_expert_intermediate_size)
        if moe.moe_shared_expert_gate:
            weights.append(_matrix(f"{at}.gate_weight", hidden_size, split="no"))
    return weights


def _of_experts(moe: MoE, name: str, size: int, is_matrix: bool = True) -> Weights:
    """One of so many elements in each routed expert."""
    active = moe.moe_router_topk * size
    total, multiplied = moe.num_moe_experts * size, active if is_matrix else 0
    return Weights(total, active, multiplied, "expert", f"mlp.experts.{name}")
