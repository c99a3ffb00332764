"""Layout, stages and parameters of a rank against what Megatron-Core really builds at every rank position."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from plan_experiments import filled

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.parameters import padded_vocab_size
from megatron_moe.plan.layout import GROUP_KINDS
from megatron_moe.plan.plan import make

pytestmark = pytest.mark.second_pair

BARE_CASES: dict[str, Experiment] = {
    "one rank": filled(),
    "CP over DP": filled(parallel={"context_parallel_size": 2, "data_parallel_size": 2}),
    "EP over TP x CP x DP": filled(
        parallel={
            "tensor_model_parallel_size": 2,
            "context_parallel_size": 2,
            "data_parallel_size": 2,
            "expert_model_parallel_size": 8,
        }
    ),
    "three stages, EP half of DP": filled(
        parallel={
            "pipeline_model_parallel_size": 3,
            "data_parallel_size": 4,
            "expert_model_parallel_size": 2,
        },
        pipeline={"layers_per_stage": [1, 2, 1]},
        recompute={"layers_per_stage": [0, 0, 0]},
    ),
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
}
MODEL_CASES: dict[str, Experiment] = {
    "EDP, uneven VPP, first layer dense, QK norm, an empty last stage": filled(
        model={"qk_norm": "head"},
        moe={"moe_layer_freq": [0, 1, 1, 1]},
        parallel={
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
        pipeline={"layers_per_stage": [1, 2, 1, 0]},
        recompute={"layers_per_stage": [0, 0]},
    ),
    "dense, tied embeddings on two stages, LayerNorm, learned positions, QKV bias": filled(
        model={
            "normalization": "LayerNorm",
            "activation": "gelu",
            "position_embedding_type": "learned_absolute",
            "untie_embeddings_and_output_weights": False,
            "qkv_bias": True,
        },
        moe=None,
        parallel={"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
        pipeline={"layers_per_stage": [3, 1]},
        recompute={"layers_per_stage": [0, 0]},
    ),
    "biases everywhere, both kinds of layers, width of heads of its own, a stage without layers": filled(
        model={"kv_channels": 24, "mlp_bias": True, "qkv_bias": True, "attention_output_bias": True},
        moe={"moe_router_bias": True, "moe_layer_freq": [1, 0, 0, 1]},
        parallel={
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
        pipeline={"layers_per_stage": [0, 1, 3, 0]},
        recompute={"layers_per_stage": [0, 0]},
    ),
    "dense, biases, one key head for four ranks, tied embeddings": filled(
        model={
            "num_query_groups": 1,
            "normalization": "LayerNorm",
            "activation": "gelu",
            "untie_embeddings_and_output_weights": False,
            "mlp_bias": True,
            "qkv_bias": True,
            "attention_output_bias": True,
            "qk_norm": "head",
        },
        moe=None,
        parallel={"tensor_model_parallel_size": 4},
    ),
    "ETP, every other layer MoE, gated shared expert, tied embeddings on one stage": filled(
        model={
            "untie_embeddings_and_output_weights": False,
        },
        moe={
            "moe_layer_freq": 2,
            "moe_shared_expert_intermediate_size": 32,
            "moe_shared_expert_gate": True,
        },
        parallel={
            "tensor_model_parallel_size": 2,
            "data_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
    ),
    "latent attention, multi-token prediction beside the loss": filled(
        model={"multi_latent_attention": LATENT, "mtp_num_layers": 2},
        moe={"moe_layer_freq": [0, 0, 1, 1]},
        parallel={"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
        pipeline={"layers_per_stage": [3, 1]},
        recompute={"layers_per_stage": [0, 0]},
    ),
    "dense latent attention, multi-token prediction, tied embeddings": filled(
        model={
            "multi_latent_attention": LATENT,
            "mtp_num_layers": 1,
            "untie_embeddings_and_output_weights": False,
        },
        moe=None,
        parallel={"pipeline_model_parallel_size": 2},
        pipeline={"layers_per_stage": [3, 1]},
        recompute={"layers_per_stage": [0, 0]},
    ),
}


def model_keywords(experiment: Experiment) -> dict[str, Any]:
    """The same model in Megatron-Core's own words."""
    model, moe, sizes = experiment.model, experiment.moe, experiment.pipeline.layers_per_stage
    shared = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    config: dict[str, Any] = {name: getattr(model, name) for name in (*shared, "ffn_hidden_size")}
    config["normalization"] = model.normalization
    config["gated_linear_unit"] = model.activation == "swiglu"
    config |= {
        "qk_layernorm": model.qk_norm == "head",
        "add_qkv_bias": model.qkv_bias,
        "add_bias_linear": model.mlp_bias,
    }
    if moe is not None:
        config.update(moe.model_dump(include={"num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq"}))
        config["moe_shared_expert_intermediate_size"] = moe.moe_shared_expert_intermediate_size
        config["moe_shared_expert_gate"] = moe.moe_shared_expert_gate
    if model.multi_latent_attention is not None:
        config |= {
            **model.multi_latent_attention.model_dump(exclude={"yarn"}),
            "qk_layernorm": True,
            "rope_type": "rope",
        }
    config["mtp_num_layers"] = model.mtp_num_layers or None
    if len(sizes) > 1:
        stages = [["decoder"] * size for size in sizes]
        config["pipeline_model_parallel_layout"] = [
            ["embedding", *stages[0]],
            *stages[1:-1],
            [*stages[-1], *["mtp"] * model.mtp_num_layers, "loss"],
        ]
    return {
        "config": config,
        "model": {
            "vocab_size": padded_vocab_size(experiment),
            "max_sequence_length": model.max_position_embeddings,
            "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
            "position_embedding_type": model.position_embedding_type,
        },
    }


@pytest.fixture(scope="module")
def built() -> dict[str, list[dict[str, Any]]]:
    """What Megatron-Core built, by case, one entry a rank. One process plays all ranks in turn."""
    cases = [{"layout": asdict(make(experiment).layout)} for experiment in BARE_CASES.values()]
    cases += [
        {"layout": asdict(make(experiment).layout), **model_keywords(experiment)}
        for experiment in MODEL_CASES.values()
    ]
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("built_by_megatron.py"))],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = json.loads(finished.stdout.splitlines()[-1])
    return dict(zip([*BARE_CASES, *MODEL_CASES], results, strict=True))


@pytest.mark.parametrize("case", [*BARE_CASES, *MODEL_CASES])
def test_groups_are_those_that_megatron_core_built(case: str, built: dict[str, Any]) -> None:
    layout = make((BARE_CASES | MODEL_CASES)[case]).layout
    assert len(built[case]) == layout.world_size
    for rank, at_rank in enumerate(built[case]):
        for kind in GROUP_KINDS:
            ours = [group for group in layout.groups(kind) if rank in group]
            theirs = at_rank["groups"][kind]
            assert ours == ([] if theirs is None else [theirs]), (kind, rank)


@pytest.mark.parametrize("case", MODEL_CASES)
def test_chunks_have_the_layers_and_parameters_that_megatron_core_gave_them(
    case: str, built: dict[str, Any]
) -> None:
    plan = make(MODEL_CASES[case])
    for rank, at_rank in enumerate(built[case]):
        ours = [
            {"layers": list(stage.layers), "parameters": plan.stage_costs[stage.index].parameters_per_rank}
            for stage in plan.stages_on(rank)
        ]
        assert ours == at_rank["chunks"], f"rank {rank}"
