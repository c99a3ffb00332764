"""What a model costs: its parameters (all, those a token passes, those a rank holds) and its FLOPs a token.

Everything follows from one table of weights, which says of each whether it is split over ranks. Published
sizes count the vocabulary as given; what a rank holds is counted with the padded one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.stages import Stage, moe_layers

FORMULA = (
    "3 x forward; forward = 2 x the matrix weights that a token passes, output layer included, "
    "+ 4 x seq_length x heads x kv_channels a layer "
    "(attention scores in full, not halved for the causal mask); recomputation is not counted"
)
"""What `flops_per_token` computes. Printed beside every number made from it."""

_UNCOUNTED = (
    "attention_output_gate",
    "experimental_attention_variant",
    "heterogeneous_block_specs",
    "is_hybrid_model",
    "linear_attention_freq",
    "moe_latent_size",
    "mtp_num_layers",
    "multi_latent_attention",
)
"""Fields of `TransformerConfig` that put other weights into the model than those below."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of the model, its vocabulary as given: all, and what a token passes (k of e experts)."""

    total: int
    active: int


@dataclass(frozen=True)
class StageCosts:
    """What one stage costs on each of its ranks."""

    parameters_per_rank: int
    """With the vocabulary padded."""


@dataclass(frozen=True)
class Weights:
    """Parameters of one kind in one layer, before they are split over ranks."""

    total: int
    active: int
    """Those that one token passes."""
    multiplied: int
    """Those of `active` that are a matrix, which a token multiplies."""
    split: Literal["no", "tensor", "expert"]
    """Over nothing, TP, or EP x ETP."""


def count_parameters(experiment: Experiment) -> Parameters:
    """Parameters of the model. Raises InputError where `model.megatron_core` makes weights unknown here."""
    weights = _model(experiment, _vocab_size(experiment))
    return Parameters(total=sum(w.total for w in weights), active=sum(w.active for w in weights))


def flops_per_token(experiment: Experiment) -> float:
    """FLOPs of forward and backward for one token of a sequence of training.seq_length, by `FORMULA`."""
    model = experiment.model
    assert model.kv_channels is not None
    products = 2 * sum(w.multiplied for w in _model(experiment, _vocab_size(experiment)))
    query_width = model.num_attention_heads * model.kv_channels
    scores = 4 * experiment.training.seq_length * query_width * model.num_layers
    return 3.0 * (products + scores)


def stage_costs(experiment: Experiment, layout: Layout, stage: Stage) -> StageCosts:
    """Costs of one stage; all ranks that hold it hold equally much."""
    _refuse_uncounted(experiment)
    ranks = {
        "no": 1,
        "tensor": layout.tensor_model_parallel_size,
        "expert": layout.expert_model_parallel_size * layout.expert_tensor_parallel_size,
    }
    vocab_size = padded_vocab_size(experiment)
    weights = [w for layer in stage.layers for w in _layer(experiment, layer in stage.moe_layers)]
    if stage.has_embedding:
        weights += _embedding(experiment, vocab_size)
    if stage.has_loss:
        weights += _output(experiment, vocab_size)
        tied = not experiment.model.untie_embeddings_and_output_weights
        if tied and not stage.has_embedding:
            weights.append(_matrix(experiment.model.hidden_size * vocab_size))
    return StageCosts(parameters_per_rank=sum(w.total // ranks[w.split] for w in weights))


def padded_vocab_size(experiment: Experiment) -> int:
    """Rows of the embedding: the vocabulary rounded up by model.make_vocab_size_divisible_by."""
    multiple = experiment.model.make_vocab_size_divisible_by
    return -(-_vocab_size(experiment) // multiple) * multiple


def _vocab_size(experiment: Experiment) -> int:
    assert experiment.model.vocab_size is not None
    return experiment.model.vocab_size


def _model(experiment: Experiment, vocab_size: int) -> list[Weights]:
    _refuse_uncounted(experiment)
    with_experts = frozenset(moe_layers(experiment))
    layers = [w for n in range(experiment.model.num_layers) for w in _layer(experiment, n in with_experts)]
    return _embedding(experiment, vocab_size) + layers + _output(experiment, vocab_size)


def _refuse_uncounted(experiment: Experiment) -> None:
    given = [field for field in _UNCOUNTED if experiment.model.megatron_core.get(field)]
    if given:
        raise InputError(
            *(
                f"model.megatron_core.{field} = {experiment.model.megatron_core[field]!r}: "
                "a model of this kind cannot be planned; remove the key"
                for field in given
            )
        )


def _option(experiment: Experiment, field: str) -> bool:
    return bool(experiment.model.megatron_core.get(field, False))


def _matrix(size: int, split: Literal["no", "tensor", "expert"] = "tensor") -> Weights:
    return Weights(total=size, active=size, multiplied=size, split=split)


def _vector(size: int, split: Literal["no", "tensor"] = "no") -> Weights:
    return Weights(total=size, active=size, multiplied=0, split=split)


def _norm(experiment: Experiment, width: int) -> Weights:
    return _vector(width if experiment.model.normalization == "RMSNorm" else 2 * width)


def _embedding(experiment: Experiment, vocab_size: int) -> list[Weights]:
    """Token and position embeddings: looked up, not multiplied."""
    model = experiment.model
    weights = [_vector(vocab_size * model.hidden_size, split="tensor")]
    if model.position_embedding_type == "learned_absolute":
        assert model.max_position_embeddings is not None
        weights.append(_vector(model.max_position_embeddings * model.hidden_size))
    return weights


def _output(experiment: Experiment, vocab_size: int) -> list[Weights]:
    """Final norm and output layer. A tied one multiplies by the embedding, and adds no parameters."""
    size = vocab_size * experiment.model.hidden_size
    own = size if experiment.model.untie_embeddings_and_output_weights else 0
    output = Weights(total=own, active=own, multiplied=size, split="tensor")
    return [_norm(experiment, experiment.model.hidden_size), output]


def _layer(experiment: Experiment, has_experts: bool) -> list[Weights]:
    model = experiment.model
    norms = [_norm(experiment, model.hidden_size) for _ in range(2)]
    if has_experts:
        return norms + _attention(experiment) + _mixture(experiment)
    assert model.ffn_hidden_size is not None
    return norms + _attention(experiment) + _feed_forward(experiment, model.ffn_hidden_size)


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


def _first_width(activation: str, inner_width: int) -> int:
    """Columns of the first matrix: a gated activation has two halves."""
    return 2 * inner_width if activation in ("swiglu", "geglu") else inner_width


def _feed_forward(experiment: Experiment, inner_width: int) -> list[Weights]:
    hidden_size = experiment.model.hidden_size
    first_width = _first_width(experiment.model.activation, inner_width)
    weights = [_matrix(hidden_size * first_width), _matrix(inner_width * hidden_size)]
    if _option(experiment, "add_bias_linear"):
        weights += [_vector(first_width, split="tensor"), _vector(hidden_size)]
    return weights


def _mixture(experiment: Experiment) -> list[Weights]:
    """Router, experts and shared experts of one layer."""
    moe, hidden_size = experiment.moe, experiment.model.hidden_size
    assert moe is not None and moe.moe_ffn_hidden_size is not None and moe.moe_expert_activation is not None
    inner_width = moe.moe_ffn_hidden_size
    first_width = _first_width(moe.moe_expert_activation, inner_width)
    matrices, biases = hidden_size * (first_width + inner_width), 0
    # The gate `hash` has no weights, and learnt noise a matrix of its own.
    routers = {"hash": 0, "noisy_topk": 2}.get(moe.moe_router_gate, 1)
    weights = [_matrix(hidden_size * moe.num_moe_experts, split="no") for _ in range(routers)]
    if _option(experiment, "add_bias_linear"):
        biases = first_width + hidden_size
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
