"""Whatever the experiment may ask for, every layout trains as one process does: losses, gradient norms and
MoE metrics of two steps. Options that don't touch each other share a case."""

from __future__ import annotations

import math
from typing import Any

import pytest
import steps_on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout

pytestmark = pytest.mark.second_pair

TP2, PP2, VPP2, CP2 = layout(tp=2), layout(pp=2), layout(pp=2, vpp=2), layout(cp=2)
EP2 = layout(dp=2, expert_model_parallel_size=2)
ETP2 = layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2)
FOUR = layout(tp=2, dp=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2)


def mcore(**fields: Any) -> dict[str, Any]:
    return {"megatron_core": fields}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {
        "moe": None,
        "model": {
            "activation": "relu",
            "rotary_percent": 0.5,
            **mcore(rotary_interleaved=True, qk_l2_norm=True),
        },
    },
    "old GPT": {
        "model": {
            "normalization": "LayerNorm",
            "position_embedding_type": "learned_absolute",
            "activation": "gelu",
            "untie_embeddings_and_output_weights": False,
        },
        "moe": MOE | {"moe_shared_expert_intermediate_size": 40, "moe_layer_freq": [0, 1, 1, 0]},
    },
    "norms and biases": {
        "model": {
            "position_embedding_type": "none",
            "activation": "squared_relu",
            "kv_channels": 12,
            "qk_norm": "head",
            "qkv_bias": True,
            **mcore(embedding_init_method_std=0.3),
        },
        "moe": MOE
        | {"moe_token_dispatcher_type": "allgather", "moe_router_topk": 1, "moe_router_pre_softmax": True},
    },
    "dropping the improbable": {
        "moe": MOE
        | {
            "moe_expert_capacity_factor": 0.8,
            "moe_shared_expert_intermediate_size": 40,
            "moe_shared_expert_gate": True,
        },
        "model": {"activation": "geglu"},
    },
    "dropping the last": {
        "moe": MOE
        | {"moe_expert_capacity_factor": 0.8, "moe_token_drop_policy": "position", "moe_layer_freq": 2},
        "model": mcore(cross_entropy_loss_fusion=True),
    },
    "without aux loss": {
        "moe": MOE
        | {
            "moe_router_load_balancing_type": "none",
            "moe_shared_expert_intermediate_size": 40,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 1.5,
            "moe_shared_expert_overlap": True,
        },
    },
    "groups of experts": {
        "moe": MOE
        | {
            "num_moe_experts": 8,
            "moe_router_dtype": "fp64",
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
        "model": mcore(no_rope_freq=2),
    },
    "as OLMoE": {
        "model": {
            "qk_norm": "all_heads",
            "clip_qkv": 0.7,
            "attention_output_bias": True,
            "rotary_scaling": {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
        },
        "moe": MOE | {"moe_router_pre_softmax": True},
    },
    "as gpt-oss": {
        "model": {
            "kv_channels": 12,
            "activation": "clamped_swiglu",
            "attention_sinks": True,
            "sliding_window": 7,
            "window_attn_skip_freq": 2,
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "rotary_base": 1500.5,
            "rotary_scaling": {
                "kind": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
        "moe": MOE | {"moe_router_bias": True},
    },
    "bfloat16": {
        "training": {"precision": "bf16"},
        "model": mcore(fp32_residual_connection=True),
    },
}
RECOMPUTED = {"recompute": {"layers_per_stage": [2, 1], "method": "uniform"}}
CASES: list[tuple[str, str, int, dict[str, Any], bool]] = [
    ("plain", "TP2 padded", 2, {"parallel": TP2}, True),
    ("plain", "PP2 padded", 2, {"parallel": PP2}, True),
    ("plain", "CP2 padded", 2, {"parallel": CP2}, True),
    ("plain", "EP2 padded", 2, {"parallel": EP2}, True),
    ("plain", "TP2 x DP2 with EP2 x ETP2", 4, {"parallel": FOUR}, False),
    ("dense", "TP2", 2, {"parallel": TP2}, False),
    ("dense", "TP2 without SP", 2, {"parallel": TP2 | {"sequence_parallel": False}}, False),
    ("dense", "CP2", 2, {"parallel": CP2}, False),
    ("old GPT", "TP2", 2, {"parallel": TP2}, False),
    ("old GPT", "PP2", 2, {"parallel": PP2}, False),
    ("old GPT", "VPP2", 2, {"parallel": VPP2}, False),
    ("norms and biases", "TP2", 2, {"parallel": TP2}, False),
    ("norms and biases", "CP2", 2, {"parallel": CP2}, False),
    ("dropping the improbable", "TP2", 2, {"parallel": TP2}, False),
    ("dropping the improbable", "ETP2 padded", 2, {"parallel": ETP2}, True),
    ("dropping the improbable", "PP2 recomputed", 2, {"parallel": PP2} | RECOMPUTED, False),
    ("dropping the last", "CP2 padded", 2, {"parallel": CP2}, True),
    ("dropping the last", "VPP2 padded", 2, {"parallel": VPP2}, True),
    ("without aux loss", "TP2 padded", 2, {"parallel": TP2}, True),
    ("without aux loss", "EP2", 2, {"parallel": EP2}, False),
    ("groups of experts", "TP2", 2, {"parallel": TP2}, False),
    ("as OLMoE", "TP2", 2, {"parallel": TP2}, False),
    ("as OLMoE", "CP2 padded", 2, {"parallel": CP2}, True),
    ("as OLMoE", "PP2 recomputed", 2, {"parallel": PP2} | RECOMPUTED, False),
    ("as gpt-oss", "TP2", 2, {"parallel": TP2}, False),
    ("as gpt-oss", "CP2 padded", 2, {"parallel": CP2}, True),
    ("as gpt-oss", "VPP2", 2, {"parallel": VPP2}, False),
    ("as gpt-oss", "TP2 x DP2 with EP2 x ETP2", 4, {"parallel": FOUR}, False),
    ("bfloat16", "TP2", 2, {"parallel": TP2}, False),
    ("bfloat16", "PP2", 2, {"parallel": PP2}, False),
]
# Adam divides a gradient by its own size: with the usual epsilon rounding would decide the sign of steps.
OPTIMIZER = {"optimizer": {"lr": 1e-2, "adam_eps": 1e-3}}
_alone: dict[tuple[str, bool], list[dict[str, float]]] = {}


def alone(name: str, padded: bool) -> list[dict[str, float]]:
    """What one process reports; computed once."""
    if (name, padded) not in _alone:
        setup = experiment(**OPTIMIZER, **OPTIONS[name])
        _alone[name, padded] = ranks(1).run(steps_on_ranks.train, setup, padded)[0]
    return _alone[name, padded]


@pytest.mark.parametrize(
    ("name", "where", "world", "sections", "padded"),
    CASES,
    ids=[f"{name}: {where}" for name, where, *_ in CASES],
)
def test_trains_as_one_process(
    name: str, where: str, world: int, sections: dict[str, Any], padded: bool
) -> None:
    expected = alone(name, padded)
    setup = experiment(**OPTIMIZER, **OPTIONS[name], **sections)
    tolerance = 1e-2 if name == "bfloat16" else 5e-6
    for reports in ranks(world).run(steps_on_ranks.train, setup, padded):
        for step, (report, one) in enumerate(zip(reports, expected, strict=True)):
            assert report.keys() == one.keys()
            for key, value in one.items():
                assert math.isfinite(value), key
                assert report[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (
                    f"step {step}: {key}"
                )


def test_loss_falls() -> None:
    """The cases above would also agree about a model that does not learn."""
    setup = experiment(optimizer={"lr": 3e-2}, training={"global_batch_size": 2, "train_iters": 60})
    losses = [report["loss"] for report in ranks(1).run(steps_on_ranks.overfit, setup, 30)[0]]
    assert losses[-1] < losses[0] / 2
