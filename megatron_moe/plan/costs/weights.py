"""The weights of each kind of piece: the table from which parameters, FLOPs and bytes follow.

Each entry says how much of it a token passes, and over which ranks it is split.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.model import MultiLatentAttention
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.units import Kind

Split = Literal["no", "tensor", "expert"]
"""Over nothing, TP, or EP x ETP."""


class Weights(NamedTuple):
    """Parameters of one kind in one piece, before they are split over ranks."""

    total: int
    active: int
    """Those that one token passes."""
    multiplied: int
    """Those of `active` that are a matrix, which a token multiplies."""
    split: Split


def weights_of(experiment: Experiment, kind: Kind, vocab_size: int) -> list[Weights]:
    """The weights of one piece, for `mtp` those of all multi-token-prediction layers.

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
    return _vector(vocab_size * experiment.model.hidden_size, split="tensor")


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


def first_width(activation: str, inner_width: int) -> int:
    """Columns of a feed-forward's first matrix: a gated activation has two halves."""
    return 2 * inner_width if activation in ("swiglu", "geglu") else inner_width


def _option(experiment: Experiment, field: str) -> bool:
    return bool(experiment.model.megatron_core.get(field, False))


def _matrix(size: int, split: Split = "tensor") -> Weights:
    return Weights(size, size, size, split)


def _vector(size: int, split: Split = "no") -> Weights:
    return Weights(size, size, 0, split)


def _norm(experiment: Experiment, width: int) -> Weights:
    return _vector(width if experiment.model.normalization == "RMSNorm" else 2 * width)


def _embedding(experiment: Experiment, vocab_size: int) -> list[Weights]:
    """Token and position embeddings: looked up, not multiplied."""
    model = experiment.model
    weights = [shared_word_embedding(experiment, vocab_size)]
    if model.position_embedding_type == "learned_absolute":
        assert model.max_position_embeddings is not None
        weights.append(_vector(model.max_position_embeddings * model.hidden_size))
    return weights


def _output(experiment: Experiment, vocab_size: int) -> list[Weights]:
    """Final norm and output layer. A tied one multiplies by the embedding, and adds no parameters."""
    size = vocab_size * experiment.model.hidden_size
    own = size if experiment.model.untie_embeddings_and_output_weights else 0
    return [_norm(experiment, experiment.model.hidden_size), Weights(own, own, size, "tensor")]


def _mtp_layer(experiment: Experiment) -> list[Weights]:
    """As Megatron-Core's MultiTokenPredictionLayer (DeepSeek-V3, section 2.2): norms of the embedding and of
    the hidden state, a projection of both together, a transformer layer, a final norm. Embedding and output
    layer are the model's."""
    width = experiment.model.hidden_size
    norms = [_norm(experiment, width) for _ in range(3)]
    return [*norms, _matrix(2 * width * width), *_layer(experiment, kind_of_mtp_layers(experiment))]


def _layer(experiment: Experiment, kind: Literal["dense", "moe"]) -> list[Weights]:
    model = experiment.model
    norms = [_norm(experiment, model.hidden_size) for _ in range(2)]
    if kind == "moe":
        return norms + attention_weights(experiment) + _mixture(experiment)
    assert model.ffn_hidden_size is not None
    return norms + attention_weights(experiment) + _feed_forward(experiment, model.ffn_hidden_size)


def attention_weights(experiment: Experiment) -> list[Weights]:
    """Those of `weights_of` a layer that are its attention's."""
    latent = experiment.model.multi_latent_attention
    return _attention(experiment) if latent is None else _latent_attention(experiment, latent)


def _attention(experiment: Experiment) -> list[Weights]:
    """Query, key, value and output projections; key and value have num_query_groups heads."""
    model = experiment.model
    assert model.num_query_groups is not None and model.kv_channels is not None
    query_width = model.num_attention_heads * model.kv_channels
    qkv_width = query_width + 2 * model.num_query_groups * model.kv_channels
    weights = [_matrix(model.hidden_size * qkv_width), _matrix(query_width * model.hidden_size)]
    if _option(experiment, "add_qkv_bias") or _option(experiment, "add_bias_linear"):
        weights.append(_vector(qkv_width, split="tensor"))
    if _option(experiment, "add_bias_linear"):
        weights.append(_vector(model.hidden_size))
    if _option(experiment, "qk_layernorm"):
        weights += [_norm(experiment, model.kv_channels) for _ in range(2)]
    return weights


def _latent_attention(experiment: Experiment, latent: MultiLatentAttention) -> list[Weights]:
    """As Megatron-Core's MLASelfAttention (DeepSeek-V2, section 2.1): down to narrow widths, a norm there, up
    to all heads. The one rotated key of all heads comes out of the way down."""
    model = experiment.model
    width, heads = model.hidden_size, model.num_attention_heads
    query_width = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    down: Split = "no"  # each tensor-parallel rank holds what leads down whole (`model.latent_attention`)
    if latent.q_lora_rank is None:
        weights = [_matrix(width * query_width)]
    else:
        weights = [
            _matrix(width * latent.q_lora_rank, split=down),
            _norm(experiment, latent.q_lora_rank),
            _matrix(latent.q_lora_rank * query_width),
        ]
    weights += [
        _matrix(width * (latent.kv_lora_rank + latent.qk_pos_emb_head_dim), split=down),
        _norm(experiment, latent.kv_lora_rank),
        _matrix(latent.kv_lora_rank * heads * (latent.qk_head_dim + latent.v_head_dim)),
        _matrix(heads * latent.v_head_dim * width),
    ]
    if _option(experiment, "add_bias_linear"):
        weights.append(_vector(width))
    return weights


def _feed_forward(experiment: Experiment, inner_width: int) -> list[Weights]:
    hidden_size = experiment.model.hidden_size
    columns = first_width(experiment.model.activation, inner_width)
    weights = [_matrix(hidden_size * columns), _matrix(inner_width * hidden_size)]
    if _option(experiment, "add_bias_linear"):
        weights += [_vector(columns, split="tensor"), _vector(hidden_size)]
    return weights


def _mixture(experiment: Experiment) -> list[Weights]:
    """Router, experts and shared experts of one layer."""
    moe, hidden_size = experiment.moe, experiment.model.hidden_size
    assert moe is not None and moe.moe_ffn_hidden_size is not None and moe.moe_expert_activation is not None
    inner_width = moe.moe_ffn_hidden_size
    columns = first_width(moe.moe_expert_activation, inner_width)
    matrices, biases = hidden_size * (columns + inner_width), 0
    # The gate `hash` has no weights, and learnt noise a matrix of its own.
    routers = {"hash": 0, "noisy_topk": 2}.get(moe.moe_router_gate, 1)
    weights = [_matrix(hidden_size * moe.num_moe_experts, split="no") for _ in range(routers)]
    if _option(experiment, "add_bias_linear"):
        biases = columns + hidden_size
        weights += [_vector(moe.num_moe_experts)] if routers else []
    weights.append(
        Weights(
            total=moe.num_moe_experts * (matrices + biases),
            active=moe.moe_router_topk * (matrices + biases),
            multiplied=moe.moe_router_topk * matrices,
            split="expert",
        )
    )
    if moe.moe_shared_expert_intermediate_size is not None:
        weights += _feed_forward(experiment, moe.moe_shared_expert_intermediate_size)
        if moe.moe_shared_expert_gate:
            weights.append(_matrix(hidden_size, split="no"))
    return weights
