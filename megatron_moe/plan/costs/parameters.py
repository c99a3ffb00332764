"""What a model costs: its parameters (all, those a token passes, those a rank holds) and its FLOPs a token.

Everything follows from the table of weights (`weights`). Published sizes count the vocabulary as given; what
a rank holds is counted with the padded one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.config.windows import keys_of_token
from megatron_moe.plan.costs.weight import Weights
from megatron_moe.plan.costs.weights import on_a_rank, shared_word_embedding, weights_of
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.stages import Stage, moe_layers
from megatron_moe.plan.units import Kind

FORMULA = (
    "3 x forward; forward = 2 x the matrix weights that a token passes, output layer included, "
    "+ 2 x seq_length x heads x (key width + value width) a layer "
    "(attention scores in full, not halved for the causal mask; with a sliding window w, "
    "w (2 - w / seq_length) in place of seq_length), with multi-token-prediction layers and an "
    "output product for each; recomputation is not counted"
)
"""What `flops_per_token` computes. Printed beside every number made from it."""

_UNCOUNTED = (
    "attention_output_gate",
    "experimental_attention_variant",
    "heterogeneous_block_specs",
    "is_hybrid_model",
    "linear_attention_freq",
    "moe_latent_size",
)
"""Fields of `TransformerConfig` that put other weights into the model than those of `weights`."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of the model without multi-token-prediction layers, its vocabulary as given: all, and what a
    token passes (k of e experts)."""

    total: int
    active: int


@dataclass(frozen=True)
class StageCosts:
    """What one stage costs on each of its ranks."""

    parameters_per_rank: int
    """With the vocabulary padded."""


def count_parameters(experiment: Experiment) -> Parameters:
    """Parameters of the model. Raises InputError where `model.megatron_core` makes weights unknown here."""
    weights = _model(experiment)
    return Parameters(total=sum(w.total for w in weights), active=sum(w.active for w in weights))


def count_mtp_parameters(experiment: Experiment) -> int:
    """Those of the multi-token-prediction layers, which published sizes leave out: they serve training."""
    return sum(w.total for w in weights_of(experiment, "mtp", _vocab_size(experiment)))


def flops_per_token(experiment: Experiment) -> float:
    """FLOPs of forward and backward for one token of a sequence of training.seq_length, by `FORMULA`."""
    model, vocab_size = experiment.model, _vocab_size(experiment)
    passed = _model(experiment) + weights_of(experiment, "mtp", vocab_size)
    passed += weights_of(experiment, "head", vocab_size) * model.mtp_num_layers
    products = 2 * sum(w.multiplied for w in passed)
    scores = scores_per_token(experiment) * (model.num_layers + model.mtp_num_layers)
    return 3.0 * (products + scores)


def scores_per_token(experiment: Experiment) -> float:
    """FLOPs of one layer's attention scores and of what they weigh, for one token, forward; a mean over
    layers."""
    model = experiment.model
    if (latent := model.multi_latent_attention) is not None:
        widths = latent.qk_head_dim + latent.qk_pos_emb_head_dim + latent.v_head_dim
    else:
        assert model.kv_channels is not None
        widths = 2 * model.kv_channels
    return 2 * keys_of_token(experiment) * model.num_attention_heads * widths


def stage_costs(experiment: Experiment, layout: Layout, stage: Stage) -> StageCosts:
    """Costs of one stage; all ranks that hold it hold equally much."""
    _refuse_uncounted(experiment)
    vocab_size = padded_vocab_size(experiment)
    kinds: list[Kind] = ["moe" if layer in stage.moe_layers else "dense" for layer in stage.layers]
    also: dict[Kind, bool] = {
        "embedding": stage.has_embedding,
        "mtp": stage.num_mtp_layers > 0,
        "head": stage.has_loss,
    }
    kinds += [kind for kind, is_here in also.items() if is_here]
    weights = [w for kind in kinds for w in weights_of(experiment, kind, vocab_size)]
    if not stage.has_embedding:
        if stage.num_mtp_layers:
            weights += weights_of(experiment, "embedding", vocab_size)
        if stage.has_loss and not experiment.model.untie_embeddings_and_output_weights:
            weights.append(shared_word_embedding(experiment, vocab_size))
    return StageCosts(parameters_per_rank=sum(on_a_rank(w, layout) for w in weights))


def padded_vocab_size(experiment: Experiment) -> int:
    """Rows of the embedding: the vocabulary rounded up by model.make_vocab_size_divisible_by."""
    multiple = experiment.model.make_vocab_size_divisible_by
    return -(-_vocab_size(experiment) // multiple) * multiple


def _vocab_size(experiment: Experiment) -> int:
    assert experiment.model.vocab_size is not None
    return experiment.model.vocab_size


def _model(experiment: Experiment) -> list[Weights]:
    """The weights of everything but the multi-token-prediction layers."""
    _refuse_uncounted(experiment)
    vocab_size, with_experts = _vocab_size(experiment), len(moe_layers(experiment))
    layers = {"moe": with_experts, "dense": experiment.model.num_layers - with_experts}
    weights = weights_of(experiment, "embedding", vocab_size) + weights_of(experiment, "head", vocab_size)
    if layers["moe"]:
        weights += weights_of(experiment, "moe", vocab_size) * layers["moe"]
    if layers["dense"]:
        weights += weights_of(experiment, "dense", vocab_size) * layers["dense"]
    return weights


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
