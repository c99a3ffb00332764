"""The layouts that `verify` must pass, each on a tiny model: one table for the tests and for `make verify`.

A case is the sections of an experiment (tests/experiments.py). Options of the model ride along with layouts
that put them to the test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import capacity_cases
import deepseek_cases
import dispatch_cases
import gate_cases
import loss_cases
import overlap_cases
import planned_cases
import verify_on_ranks as on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.auto import placed
from megatron_moe.plan.layout import Layout
from megatron_moe.training.verify_report import Report

Sections = dict[str, Any]

TIED = {"untie_embeddings_and_output_weights": False}
BIASES = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
AS_OLMOE = {
    "qk_norm": "all_heads",
    "clip_qkv": 2.0,
    "rotary_scaling": {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
}
AS_GPT_OSS = {
    **BIASES,
    "activation": "clamped_swiglu",
    "attention_sinks": True,
    "sliding_window": 7,
    "window_attn_skip_freq": 2,
    "rotary_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
BOTH_KINDS = {**MOE, "moe_layer_freq": [1, 1, 0, 0]}
ETP2 = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}


def stages(text: str) -> Sections:
    """A layout string."""
    return {"pipeline": {"layers_per_stage": text}}


LAYOUTS: dict[str, Sections] = {
    **capacity_cases.CAPACITY_LAYOUTS,
    **deepseek_cases.DEEPSEEK_LAYOUTS,
    **dispatch_cases.DISPATCH_LAYOUTS,
    **gate_cases.GATE_LAYOUTS,
    **loss_cases.LOSS_LAYOUTS,
    **overlap_cases.OVERLAP_LAYOUTS,
    **planned_cases.PLANNED_LAYOUTS,
    # two ranks
    "DP2": {"parallel": layout(dp=2)},
    "TP2 dense, no SP": {"moe": None, "parallel": layout(tp=2, sequence_parallel=False)},
    "TP2 dense": {"moe": None, "parallel": layout(tp=2)},
    "TP2 QK norm": {
        "moe": None,
        "parallel": layout(tp=2, sequence_parallel=False),
        "model": {"qk_norm": "head"},
    },
    "TP2 EP1": {"parallel": layout(tp=2, expert_model_parallel_size=1)},
    "EP2": {"parallel": layout(dp=2, **EP2)},
    "EDP shared experts, allgather": {
        "parallel": layout(tp=2),
        "moe": {**MOE, "moe_shared_expert_intermediate_size": 32, "moe_token_dispatcher_type": "allgather"},
    },
    "EDP gated shared experts, relu experts, a dense layer first": {
        "parallel": layout(tp=2),
        "moe": {
            **MOE,
            "moe_shared_expert_intermediate_size": 32,
            "moe_shared_expert_gate": True,
            "moe_expert_activation": "relu",
            "moe_first_k_dense_layers": 1,
        },
    },
    "PP2 fine-grained experts of other scale, first stage dense": {
        "parallel": layout(pp=2),
        "moe": {
            **MOE,
            "num_moe_experts": 16,
            "moe_router_topk": 4,
            "moe_ffn_hidden_size": 16,
            "moe_expert_init_scale": 2.0,
            "moe_router_init_scale": 0.5,
            "moe_first_k_dense_layers": 2,
        },
    },
    "EDP biases, both kinds of layers": {
        "parallel": layout(tp=2),
        "model": BIASES,
        "moe": {**MOE, "moe_layer_freq": 2},
    },
    "EDP kv_channels, QKV bias": {
        "parallel": layout(tp=2),
        "model": {"kv_channels": 12, "qkv_bias": True, "qk_norm": "head"},
    },
    "EDP as OLMoE": {"parallel": layout(tp=2), "model": AS_OLMOE},
    "CP2 as OLMoE": {"parallel": layout(cp=2), "model": AS_OLMOE},
    "TP2 without SP as OLMoE, dense": {
        "moe": None,
        "parallel": layout(tp=2, sequence_parallel=False),
        "model": AS_OLMOE,
    },
    "EDP as gpt-oss": {
        "parallel": layout(tp=2),
        "model": AS_GPT_OSS,
        "moe": {**MOE, "moe_router_bias": True},
    },
    "CP2 as gpt-oss": {
        "parallel": layout(cp=2),
        "model": AS_GPT_OSS,
        "moe": {**MOE, "moe_router_bias": True},
    },
    "PP2 as gpt-oss": {
        "parallel": layout(pp=2),
        "model": AS_GPT_OSS,
        "moe": {**MOE, "moe_router_bias": True},
    },
    "ETP2": {"parallel": layout(tp=2, **ETP2)},
    "ETP2 biases": {"parallel": layout(tp=2, **ETP2), "model": BIASES},
    "ETP2 over DP2": {"parallel": layout(dp=2, **ETP2)},
    "CP2 one key head": {"parallel": layout(cp=2), "model": {"num_query_groups": 1}},
    "PP2": {"parallel": layout(pp=2)},
    "PP2 uneven, recompute": {
        "parallel": layout(pp=2),
        "pipeline": {"layers_per_stage": [3, 1]},
        "recompute": {"layers_per_stage": [2, 0]},
    },
    "PP2 embedding alone": {"parallel": layout(pp=2), **stages("E|t*4,L")},
    "PP2 VPP2": {"parallel": layout(pp=2, vpp=2)},
    "PP2 VPP2 uneven": {"parallel": layout(pp=2), **stages("Et|t|tt|L")},
    # four ranks
    "TP2 CP2 EP2": {"parallel": layout(tp=2, cp=2, **EP2)},
    "TP2 DP2 EP4": {"parallel": layout(tp=2, dp=2, **EP4)},
    "TP2 DP2 ETP2 EP2": {
        "parallel": layout(tp=2, dp=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    },
    "TP4, two key heads": {"parallel": layout(tp=4)},
    "CP2 DP2 EP2 biases": {"parallel": layout(cp=2, dp=2, **EP2), "model": BIASES},
    "PP2 DP2 tied": {"parallel": layout(pp=2, dp=2), "model": TIED},
    "PP2 EP2, a stage without experts": {"parallel": layout(pp=2, dp=2, **EP2), "moe": BOTH_KINDS},
    "PP2 VPP2 EP2 tied, chunks without experts": {
        "parallel": layout(pp=2, dp=2, **EP2),
        "model": TIED,
        "moe": BOTH_KINDS,
        **stages("E|tt|t|tL"),
    },
    "TP2 PP2 LayerNorm, gelu, learned positions": {
        "parallel": layout(tp=2, pp=2),
        "model": {
            "normalization": "LayerNorm",
            "activation": "gelu",
            "position_embedding_type": "learned_absolute",
        },
    },
    "TP2 PP2 VPP2": {"parallel": layout(tp=2, pp=2, vpp=2)},
    "PP4 tied": {"parallel": layout(pp=4), "model": TIED},
    "PP4 embedding and loss alone": {"parallel": layout(pp=4), **stages("E|(tt|)*2,L")},
}

SECOND_PAIR = (
    *capacity_cases.SECOND_PAIR,
    *deepseek_cases.SECOND_PAIR,
    *dispatch_cases.SECOND_PAIR,
    *overlap_cases.SECOND_PAIR,
    *gate_cases.SECOND_PAIR,
    "ETP2 biases",
    "PP2 VPP2 uneven",
    "TP2 CP2 EP2",
    "PP4 tied",
)
"""Those that the tests run on the second version pair too; `make verify` there runs all."""


def experiment_of(sections: Sections) -> Experiment:
    """The case's experiment, filled and its stages placed."""
    return placed(experiment(**sections), None)


def verify(
    folder: Path,
    parallel: Sections,
    steps: int = 1,
    fault: on_ranks.Change | None = None,
    padded: bool = False,
    change: on_ranks.Change | None = None,
    **sections: Any,
) -> Report:
    """Both parts, as the command runs them: the layout's ranks, then one process. A `fault` is in the first
    one only, a `change` in both."""
    under_layout = experiment_of({"parallel": parallel, **sections})
    of_model = {key: value for key, value in sections.items() if key not in ("pipeline", "recompute")}
    alone = experiment(parallel=layout(dp=1, expert_model_parallel_size=1), **of_model)
    change = on_ranks.pad if padded else change
    pool = ranks(Layout.of(under_layout).world_size)
    pool.run(on_ranks.layout_part, under_layout, steps, folder, change or fault)
    (report,) = ranks(1).run(on_ranks.reference_part, alone, steps, folder, None, change)
    return report
