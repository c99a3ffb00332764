"""The weights that model families share, ours beside theirs: attention, feed-forwards, experts, embeddings.

`ours` and `theirs` are the names of a layer, such as "decoder.layers.3" and "model.layers.3". Which weights
there are follows from the experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.correspondence import Group, gated, padded, query_key_value, same, with_copies

Part = Callable[[Experiment, str, str], Iterator[Group]]
"""Some of a layer's weights, by its names."""
FREQUENCIES = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Tables that old files have."""


@dataclass(frozen=True)
class MoENames:
    """What a family calls the parts of an MoE layer, without the layer's own name.

    Attributes:
        router: the linear layer with a row an expert.
        experts: what numbered experts lie in.
        gate, up, down: the projections of an expert.
        shared: the shared experts, whose projections are gate_proj, up_proj and down_proj.
        shared_gate: the weight that weighs their output.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate.weight"


def transformer(e: Experiment, attention: Part, mixture: Part | None = None) -> Iterator[Group]:
    """All weights of a model: its edges and its layers."""
    yield from edges(e)
    yield from layers(e, attention, mixture)


def layers(e: Experiment, attention: Part, mixture: Part | None = None) -> Iterator[Group]:
    """In each layer attention and a feed-forward, of which those that hold experts are `mixture`."""
    for layer, holds_experts in enumerate(moe_layers(e)):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield from attention(e, ours, theirs)
        if not holds_experts:
            yield from feed_forward(e, ours, theirs)
        elif mixture is not None:
            yield from mixture(e, ours, theirs)


def edges(e: Experiment, repeated_in: Sequence[str] = ()) -> Iterator[Group]:
    """Embedding, last norm, and the output layer where it is not the embedding.

    Args:
        repeated_in: layers of theirs which hold copies of the embedding and the output layer.
    """
    embeddings = [f"{layer}.embed_tokens.weight" for layer in repeated_in]
    heads = [f"{layer}.shared_head.head.weight" for layer in repeated_in]
    tied = not e.model.untie_embeddings_and_output_weights
    first = _rows(e, "embedding.word_embeddings.weight", "model.embed_tokens.weight")
    yield with_copies(first, embeddings + heads * tied)
    yield same("decoder.final_layernorm.weight", "model.norm.weight")
    if not tied:
        yield with_copies(_rows(e, "output_layer.weight", "lm_head.weight"), heads)


def _rows(e: Experiment, ours: str, theirs: str) -> Group:
    rows, multiple = e.model.vocab_size, e.model.make_vocab_size_divisible_by
    assert rows is not None
    return padded(ours, theirs, rows, -(-rows // multiple) * multiple)


def attention(e: Experiment, ours: str, theirs: str) -> Iterator[Group]:
    """Norm, projections with their biases, norms of queries and keys, sinks."""
    model, own, other = e.model, f"{ours}.self_attention", f"{theirs}.self_attn"
    groups = model.num_query_groups
    assert groups is not None
    yield same(f"{own}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight")
    for kind in ["weight"] + ["bias"] * model.qkv_bias:
        projections = [f"{other}.{name}_proj.{kind}" for name in "qkv"]
        yield query_key_value(f"{own}.linear_qkv.{kind}", projections, model.num_attention_heads, groups)
    if model.qk_norm is not None:
        yield same(f"{own}.q_layernorm.weight", f"{other}.q_norm.weight")
        yield same(f"{own}.k_layernorm.weight", f"{other}.k_norm.weight")
    if model.attention_sinks:
        yield same(f"{own}.core_attention.softmax_offset", f"{other}.sinks")
    for kind in ["weight"] + ["bias"] * model.attention_output_bias:
        yield same(f"{own}.linear_proj.{kind}", f"{other}.o_proj.{kind}")


def latent_attention(e: Experiment, ours: str, theirs: str) -> Iterator[Group]:
    """Multi-latent attention: projections down, norms, projections up."""
    latent, own, other = e.model.multi_latent_attention, f"{ours}.self_attention", f"{theirs}.self_attn"
    assert latent is not None
    yield same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
    if latent.q_lora_rank is None:
        yield same(f"{own}.linear_q_proj.weight", f"{other}.q_proj.weight")
    else:
        yield same(f"{own}.linear_q_down_proj.weight", f"{other}.q_a_proj.weight")
        yield same(f"{own}.linear_q_up_proj.layer_norm_weight", f"{other}.q_a_layernorm.weight")
        yield same(f"{own}.linear_q_up_proj.weight", f"{other}.q_b_proj.weight")
    yield same(f"{own}.linear_kv_down_proj.weight", f"{other}.kv_a_proj_with_mqa.weight")
    yield same(f"{own}.linear_kv_up_proj.layer_norm_weight", f"{other}.kv_a_layernorm.weight")
    yield same(f"{own}.linear_kv_up_proj.weight", f"{other}.kv_b_proj.weight")
    yield same(f"{own}.linear_proj.weight", f"{other}.o_proj.weight")


def feed_forward(e: Experiment, ours: str, theirs: str) -> Iterator[Group]:
    """A dense gated feed-forward with its norm."""
    yield same(f"{ours}.mlp.linear_fc1.layer_norm_weight", f"{theirs}.post_attention_layernorm.weight")
    for kind in ["weight"] + ["bias"] * e.model.mlp_bias:
        first = (f"{theirs}.mlp.gate_proj.{kind}", f"{theirs}.mlp.up_proj.{kind}")
        yield gated(f"{ours}.mlp.linear_fc1.{kind}", *first)
        yield same(f"{ours}.mlp.linear_fc2.{kind}", f"{theirs}.mlp.down_proj.{kind}")


def mixture(names: MoENames) -> Part:
    """An MoE layer with its norm: router, single experts, shared experts."""

    def groups(e: Experiment, ours: str, theirs: str) -> Iterator[Group]:
        moe = e.moe
        assert moe is not None
        yield same(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
        yield same(f"{ours}.mlp.router.weight", f"{theirs}.{names.router}.weight")
        if moe.moe_router_enable_expert_bias:
            yield same(f"{ours}.mlp.router.expert_bias", f"{theirs}.{names.router}.e_score_correction_bias")
        for expert in range(moe.num_moe_experts):
            own, other = f"{ours}.mlp.experts.{expert}", f"{theirs}.{names.experts}.{expert}"
            first = (f"{other}.{names.gate}.weight", f"{other}.{names.up}.weight")
            yield gated(f"{own}.linear_fc1.weight", *first)
            yield same(f"{own}.linear_fc2.weight", f"{other}.{names.down}.weight")
        if moe.moe_shared_expert_intermediate_size is not None:
            own, other = f"{ours}.mlp.shared_experts", f"{theirs}.{names.shared}"
            first = (f"{other}.gate_proj.weight", f"{other}.up_proj.weight")
            yield gated(f"{own}.linear_fc1.weight", *first)
            yield same(f"{own}.linear_fc2.weight", f"{other}.down_proj.weight")
            if moe.moe_shared_expert_gate:
                yield same(f"{own}.gate_weight", f"{theirs}.{names.shared_gate}")

    return groups
