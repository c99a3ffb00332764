"""The weights that `training.lora` puts beside the model's: for each matrix [out, in] an A [rank, in] and a
B [out, rank]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.weight import Split, Weights, first_width

Cut = Literal["rows", "columns", "no"]
"""How TP cuts the matrix: by rows its B is cut and its A is not, by columns the other way round."""


def adapters_of(experiment: Experiment, kind: Literal["dense", "moe"]) -> list[Weights]:
    """Of one layer."""
    lora = experiment.training.lora
    if lora is None:
        return []
    found: list[Weights] = []
    if "attention" in lora.targets:
        for name, rows, columns, cut in _attention(experiment):
            found += _pair(f"self_attention.{name}", rows, columns, lora.rank, cut)
    if kind == "dense" and "mlp" in lora.targets:
        assert experiment.model.ffn_hidden_size is not None
        found += _feed_forward(experiment, "mlp", experiment.model.ffn_hidden_size)
    if kind == "moe" and experiment.moe is not None:
        width = experiment.moe.moe_shared_expert_intermediate_size
        if "shared_experts" in lora.targets and width is not None:
            found += _feed_forward(experiment, "mlp.shared_experts", width)
        if "experts" in lora.targets:
            found += _experts(experiment)
    return found


def _pair(at: str, rows: int, columns: int, rank: int, cut: Cut) -> list[Weights]:
    of_a: Split = "tensor" if cut == "columns" else "no"
    of_b: Split = "tensor" if cut == "rows" else "no"
    return [
        Weights(rank * columns, rank * columns, rank * columns, of_a, f"{at}.lora_a"),
        Weights(rows * rank, rows * rank, rows * rank, of_b, f"{at}.lora_b"),
    ]


def _feed_forward(experiment: Experiment, at: str, inner_width: int) -> list[Weights]:
    assert experiment.training.lora is not None
    width, rank = experiment.model.hidden_size, experiment.training.lora.rank
    first = first_width(experiment.model.activation, inner_width)
    return [
        *_pair(f"{at}.linear_fc1", first, width, rank, "rows"),
        *_pair(f"{at}.linear_fc2", width, inner_width, rank, "columns"),
    ]


def _experts(experiment: Experiment) -> list[Weights]:
    moe, lora = experiment.moe, experiment.training.lora
    assert moe is not None and lora is not None
    assert moe.moe_ffn_hidden_size is not None and moe.moe_expert_activation is not None
    width, inner = experiment.model.hidden_size, moe.moe_ffn_hidden_size
    pairs = [
        *_pair(
            "mlp.experts.linear_fc1", first_width(moe.moe_expert_activation, inner), width, lora.rank, "no"
        ),
        *_pair("mlp.experts.linear_fc2", width, inner, lora.rank, "no"),
    ]
    return [
        Weights(
            total=moe.num_moe_experts * one.total,
            active=moe.moe_router_topk * one.total,
            multiplied=moe.moe_router_topk * one.total,
            split="expert",
            name=one.name,
        )
        for one in pairs
    ]


def _attention(experiment: Experiment) -> Iterator[tuple[str, int, int, Cut]]:
    """(name, rows, columns, how TP cuts it) of each projection."""
    model = experiment.model
    width, heads, latent = model.hidden_size, model.num_attention_heads, model.multi_latent_attention
    if latent is None:
        assert model.num_query_groups is not None and model.kv_channels is not None
        yield "linear_qkv", (heads + 2 * model.num_query_groups) * model.kv_channels, width, "rows"
        yield "linear_proj", width, heads * model.kv_channels, "columns"
        return
    query_rows = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    if latent.q_lora_rank is None:
        yield "linear_q_proj", query_rows, width, "rows"
    else:
        yield "linear_q_down_proj", latent.q_lora_rank, width, "no"
        yield "linear_q_up_proj", query_rows, latent.q_lora_rank, "rows"
    yield "linear_kv_down_proj", latent.kv_lora_rank + latent.qk_pos_emb_head_dim, width, "no"
    yield "linear_kv_up_proj", heads * (latent.qk_head_dim + latent.v_head_dim), latent.kv_lora_rank, "rows"
    yield "linear_proj", width, heads * latent.v_head_dim, "columns"
