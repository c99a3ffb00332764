"""Frozen weights and adapters compute in every layout what they compute in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finetuning_on_ranks as on_ranks
import pytest
from experiments import MOE, layout
from layout_cases import EP2, ETP2, TIED, verify

BOTH_KINDS = {**MOE, "moe_layer_freq": [0, 1, 0, 1], "moe_shared_expert_intermediate_size": 32}
ALL = ["attention", "mlp", "shared_experts", "experts"]


def lora(*targets: str, **more: Any) -> dict[str, Any]:
    return {"lora": {"rank": 4, "targets": list(targets), **more}}


LATENT = {
    "multi_latent_attention": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 8,
    }
}
ADAPTED: dict[str, dict[str, Any]] = {
    "ETP2": {"parallel": layout(tp=2, **ETP2), "moe": BOTH_KINDS, "training": lora(*ALL)},
    "TP2 PP2 ETP1 EP2, full recompute": {
        "parallel": layout(tp=2, pp=2, **EP2),
        "moe": BOTH_KINDS,
        "training": lora(*ALL),
        "recompute": {"granularity": "full"},
    },
    "TP2 dense, no SP, dropout": {
        "parallel": layout(tp=2, sequence_parallel=False),
        "moe": None,
        "training": lora("attention", "mlp", dropout=0.2),
    },
    "TP2 PP2, dropout, full recompute": {
        "parallel": layout(tp=2, pp=2),
        "moe": BOTH_KINDS,
        "training": lora("attention", "mlp", "shared_experts", dropout=0.2),
        "recompute": {"granularity": "full"},
    },
    "CP2 DP2, dropout": {
        "parallel": layout(cp=2, dp=2),
        "moe": BOTH_KINDS,
        "training": lora("attention", "shared_experts", dropout=0.2),
    },
    "TP2 latent attention": {
        "parallel": layout(tp=2),
        "model": {"num_query_groups": 4, **LATENT},
        "training": lora("attention", "experts"),
    },
}
FROZEN: dict[str, dict[str, Any]] = {
    "MoE parts only, EDP": {
        "parallel": layout(tp=2),
        "moe": BOTH_KINDS,
        "training": {"freeze": ["attention", "mlp", "norms", "embeddings", "output"]},
    },
    "experts only, EP2 DP2": {
        "parallel": layout(dp=2, **EP2),
        "training": {"freeze": ["attention", "router", "norms", "embeddings", "output"]},
    },
    "all but the MoE parts, PP2 tied": {
        "parallel": layout(pp=2),
        "model": TIED,
        "training": {"freeze": ["router", "experts"]},
    },
    "a stage of nothing else, PP2 tied, recomputed": {
        "parallel": layout(pp=2, dp=2, overlap_grad_reduce=True, overlap_param_gather=True),
        "model": TIED,
        "training": {"freeze": ["embeddings", "decoder.layers.[01].*"]},
        "recompute": {"granularity": "full"},
    },
    "the embedding, TP2 PP2 VPP2, norms recomputed": {
        "parallel": layout(tp=2, pp=2, vpp=2),
        "training": {"freeze": ["embeddings", "router"]},
        "recompute": {"modules": ["layernorm", "moe_act"]},
    },
}


SECOND_PAIR = ("ETP2", "TP2 PP2, dropout, full recompute", "a stage of nothing else, PP2 tied, recomputed")


def names(cases: dict[str, dict[str, Any]]) -> list[Any]:
    marks = pytest.mark.second_pair
    return [pytest.param(name, marks=marks if name in SECOND_PAIR else ()) for name in cases]


@pytest.mark.parametrize("name", names(ADAPTED))
def test_adapters_compute_the_same(tmp_path: Path, name: str) -> None:
    assert verify(tmp_path, change=on_ranks.draw_adapters, **ADAPTED[name]).failures == []


@pytest.mark.parametrize("name", names(FROZEN))
def test_the_rest_is_trained_alike(tmp_path: Path, name: str) -> None:
    assert verify(tmp_path, **FROZEN[name]).failures == []
