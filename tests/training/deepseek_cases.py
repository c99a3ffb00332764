"""Layouts of models with DeepSeek's latent attention and multi-token prediction, for layout_cases.py."""

from __future__ import annotations

from typing import Any

from experiments import MOE, layout

EP2 = {"expert_model_parallel_size": 2}
LATENT: dict[str, Any] = {
    "num_query_groups": None,
    "multi_latent_attention": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
    },
}
STRETCHED: dict[str, Any] = {
    "num_query_groups": None,
    "multi_latent_attention": {
        # Nothing of it has to be divisible by TP.
        "kv_lora_rank": 15,
        "qk_head_dim": 7,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 9,
        "yarn": {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 0.7},
    },
}
"""Queries projected at once, positions stretched."""

ONE = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}
TWO = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}

DEEPSEEK_LAYOUTS: dict[str, dict[str, Any]] = {
    "EDP latent attention, recomputed": {
        "parallel": layout(tp=2),
        "model": LATENT,
        "recompute": {"modules": ["core_attn", "layernorm"]},
    },
    "PP2 latent attention, uneven, recompute": {
        "parallel": layout(pp=2),
        "model": LATENT,
        "pipeline": {"layers_per_stage": [1, 3]},
        "recompute": {"layers_per_stage": [1, 2]},
    },
    "CP2 latent attention, stretched positions": {"parallel": layout(cp=2), "model": STRETCHED},
    "TP2 CP2 EP2 latent attention, stretched positions": {
        "parallel": layout(tp=2, cp=2, **EP2),
        "model": STRETCHED,
        "moe": {**MOE, "moe_first_k_dense_layers": 1},
    },
    "EDP two further tokens, latent attention": {
        "parallel": layout(tp=2),
        "model": {**LATENT, **TWO},
        "recompute": {"granularity": "full"},
    },
    "TP2 dense, no SP, a further token": {
        "moe": None,
        "parallel": layout(tp=2, sequence_parallel=False),
        "model": ONE,
    },
    "CP2 two further tokens, drops": {
        "parallel": layout(cp=2),
        "model": TWO,
        "moe": {**MOE, "moe_expert_capacity_factor": 1.0},
        "recompute": {"modules": ["moe", "layernorm"]},
    },
    "PP2 VPP2 a further token": {"parallel": layout(pp=2, vpp=2), "model": ONE},
    "TP2 PP2 two further tokens beside the loss alone, random gate": {
        "parallel": layout(tp=2, pp=2),
        "model": TWO,
        "pipeline": {"layers_per_stage": "Etttt|mmL"},
        "moe": {**MOE, "moe_router_gate": "gshard"},
    },
    "PP4 two further tokens on a stage of their own": {
        "parallel": layout(pp=4),
        "model": TWO,
        "pipeline": {"layers_per_stage": "Ett|tt|mm|L"},
    },
}

SECOND_PAIR = (
    "EDP latent attention, recomputed",
    "CP2 latent attention, stretched positions",
    "EDP two further tokens, latent attention",
    "PP2 VPP2 a further token",
    "PP4 two further tokens on a stage of their own",
)
