"""Activations of each piece against what really stays for the backward pass, on a host."""

from __future__ import annotations

from typing import Any

import pytest
from activations_on_ranks import EMBEDDING, HEAD, kept, kept_as_on_a_gpu, working
from distributed import ranks
from experiments import experiment, layout

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.memory import activations
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.units import Kind

MODEL = {"num_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 320}
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 192, "moe_layer_freq": [0, 0, 1]}
LATENT = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 48,
}
SHARED = {"moe_shared_expert_intermediate_size": 96, "moe_shared_expert_gate": True}
SIGMOID = {"num_moe_experts": 16, "moe_router_topk": 4, "moe_router_score_function": "sigmoid"}
SKYWORK = {"moe_router_logit_normalization": 1.0, "moe_router_pre_softmax": True, "num_moe_experts": 16}


def sized(moe: dict[str, Any] | None = None, ranks: int = 1, **sections: Any) -> tuple[Experiment, int]:
    """A model with two dense layers and one with experts, large beside what a layer keeps whatever its size;
    every expert rank is taken for one with the mean load."""
    training = {"seq_length": 256, "micro_batch_size": 1, **sections.pop("training", {})}
    launch = {"expert_imbalance": 1.0, **sections.pop("launch", {})}
    given = experiment(
        moe={**MOE, **(moe or {})},
        model={**MODEL, "vocab_size": 1000, **sections.pop("model", {})},
        training=training,
        launch=launch,
        **sections,
    )
    return given, ranks


EP2 = layout(dp=2, expert_model_parallel_size=2)
CASES: dict[str, tuple[Experiment, int]] = {
    "fp32": sized(),
    "bf16, two sequences": sized(training={"precision": "bf16", "micro_batch_size": 2}),
    "norms of heads": sized(model={"qk_norm": "head"}),
    "norms of heads in bf16": sized(model={"qk_norm": "head"}, training={"precision": "bf16"}),
    "norms of all heads": sized(model={"qk_norm": "all_heads"}),
    "norms of all heads in bf16": sized(model={"qk_norm": "all_heads"}, training={"precision": "bf16"}),
    "windows": sized(model={"sliding_window": 40}),
    "windows, in parts": sized(model={"sliding_window": 40}, training={"seq_length": 512}),
    "sinks": sized(model={"attention_sinks": True}),
    "a clamped activation": sized(model={"activation": "clamped_swiglu"}),
    "LayerNorm, gelu, learned positions, dropout": sized(
        model={
            "normalization": "LayerNorm",
            "activation": "gelu",
            "position_embedding_type": "learned_absolute",
            "hidden_dropout": 0.1,
        }
    ),
    "heads of their own, squared relu, no positions": sized(
        model={"num_query_groups": 4, "activation": "squared_relu", "position_embedding_type": "none"}
    ),
    "latent attention": sized(model={"multi_latent_attention": LATENT, "num_query_groups": None}),
    "latent attention with narrow values": sized(
        model={"multi_latent_attention": {**LATENT, "v_head_dim": 32}, "num_query_groups": None}
    ),
    "latent attention in bf16, queries at once": sized(
        model={"multi_latent_attention": {**LATENT, "q_lora_rank": None}, "num_query_groups": None},
        training={"precision": "bf16"},
    ),
    "multi-token prediction": sized(model={"mtp_num_layers": 2}),
    "sigmoid scores, shared experts with a gate": sized(SIGMOID | SHARED),
    "normalised logits, z-loss": sized(SKYWORK | {"moe_z_loss_coeff": 0.01}),
    "expert dropout": sized({"moe_expert_dropout": 0.1}),
    "biases": sized(model={"mlp_bias": True, "qkv_bias": True, "attention_output_bias": True}),
    "core_attn again": sized(recompute={"modules": ["core_attn"]}),
    "norms and feed-forwards again": sized(recompute={"modules": ["layernorm", "mlp"]}),
    "experts again": sized(SHARED, recompute={"modules": ["moe"]}),
    "shared experts again": sized(SHARED, recompute={"modules": ["shared_experts"]}),
    "activation of experts again": sized({"moe_expert_dropout": 0.1}, recompute={"modules": ["moe_act"]}),
    "TP, SP, EDP": sized(ranks=2, parallel=layout(tp=2)),
    "TP without SP": sized({"moe_layer_freq": [0, 0, 0]}, 2, parallel=layout(tp=2, sequence_parallel=False)),
    "latent attention under TP": sized(
        ranks=2,
        model={"multi_latent_attention": LATENT, "num_query_groups": None, "mtp_num_layers": 1},
        parallel=layout(tp=2),
    ),
    "ETP": sized(ranks=2, parallel=layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2)),
    "CP, EP": sized(ranks=2, parallel=layout(cp=2, expert_model_parallel_size=2)),
    "EP by all-gather": sized({"moe_token_dispatcher_type": "allgather"}, 2, parallel=EP2),
    "EP without duplicates": sized({"moe_token_dispatcher_type": "deduplicated"}, 2, parallel=EP2),
}


ON_BOTH_PAIRS = ("fp32", "latent attention", "multi-token prediction", "TP, SP, EDP")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.second_pair) if c in ON_BOTH_PAIRS else c for c in CASES],
)
def test_pieces_keep_what_the_planner_counts(case: str) -> None:
    """Of a layer to 1.5 %, the mean over ranks, and of the whole to 1 %. The first layer is only part of the
    whole: in bf16 its input stays until the forward pass is over, and not longer."""
    given, count = CASES[case]
    _agree(given, ranks(count).run(kept, given))


GPU: dict[str, Any] = {"launch": {"cluster": {"preset": "h100"}}, "training": {"precision": "bf16"}}
ON_A_GPU: dict[str, tuple[Experiment, int]] = {
    "plain": sized(**GPU),
    "shared experts, activation of experts again": sized(SHARED, **GPU, recompute={"modules": ["moe_act"]}),
    "EP, not gated, norms of heads": sized(
        ranks=2,
        **GPU,
        model={"activation": "gelu", "qk_norm": "head"},
        parallel=EP2,
    ),
    "latent attention": sized(**GPU, model={"multi_latent_attention": LATENT, "num_query_groups": None}),
}


@pytest.mark.parametrize("case", ON_A_GPU)
def test_pieces_keep_what_the_planner_counts_for_a_gpu(case: str) -> None:
    """On a host that takes a GPU's paths through our code; what kernels themselves save is not seen."""
    given, count = ON_A_GPU[case]
    _agree(given, ranks(count).run(kept_as_on_a_gpu, given))


def _agree(given: Experiment, measured: list[dict[str, float]]) -> None:
    mean = {name: sum(rank[name] for rank in measured) / len(measured) for name in measured[0]}
    parts = Layout.of(given)
    last: Kind = "moe" if moe_layers(given)[-1] else "dense"
    planned = {"1": activations(given, parts, "dense").kept, "2": activations(given, parts, last).kept}
    assert {name: mean[name] for name in planned} == pytest.approx(planned, rel=0.015)
    whole = sum(planned.values()) + planned["1"]
    whole += activations(given, parts, EMBEDDING).kept + activations(given, parts, HEAD).kept
    if given.model.mtp_num_layers:
        whole += activations(given, parts, "mtp").kept
    assert sum(mean.values()) == pytest.approx(whole, rel=0.01)


def test_fuller_experts_keep_more_rows_unless_they_drop_them() -> None:
    def of_layer(imbalance: float, factor: float | None = None) -> float:
        given, _ = sized({"moe_expert_capacity_factor": factor}, parallel=EP2)
        launch = given.launch.model_copy(update={"expert_imbalance": imbalance})
        given = given.model_copy(update={"launch": launch})
        return activations(given, Layout.of(given), "moe").kept

    even, fuller = of_layer(1.0), of_layer(1.5)
    # Rows of 128 numbers, what the first matrix makes of them (2 x 192), and a gate weight.
    assert fuller - even == pytest.approx(0.5 * 256 * 2 * (128 + 2 * 192 + 1) * 4)
    assert of_layer(1.0, factor=1.5) == of_layer(3.0, factor=1.5) == fuller


@pytest.mark.parametrize("method", ["block", "uniform"])
def test_layers_that_are_computed_again_keep_their_input(method: str) -> None:
    given, _ = sized(recompute={"layers_per_stage": [3], "method": method})
    (measured,) = ranks(1).run(kept, given)
    parts = Layout.of(given)
    inputs = [measured[name] for name in (EMBEDDING, "0", "1", "2")]
    head = activations(given, parts, HEAD)
    groups = 3 if method == "block" else 1
    again = activations(given, parts, "moe").kept_if_recomputed
    # The last layer's output is the head's.
    assert sum(inputs) == pytest.approx(groups * again + head.kept_if_recomputed, rel=0.01)


@pytest.mark.parametrize("case", ["fp32", "latent attention", "sigmoid scores, shared experts with a gate"])
def test_pieces_need_beside_that_what_the_planner_counts(case: str) -> None:
    """To 6 %."""
    given, _ = CASES[case]
    (measured,) = ranks(1).run(working, given)
    parts = Layout.of(given)
    planned = {
        "1": activations(given, parts, "dense").working,
        "2": activations(given, parts, "moe").working,
        HEAD: activations(given, parts, HEAD).working,
    }
    assert {name: measured[name] for name in planned} == pytest.approx(planned, rel=0.06)
