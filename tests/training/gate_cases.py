"""Layouts of layout_cases.py, one at least for every gate and for what goes before a gate."""

from __future__ import annotations

from typing import Any

from experiments import MOE, layout

EDP, CP2, PP2 = layout(tp=2), layout(cp=2), layout(pp=2)
EP2 = layout(dp=2, expert_model_parallel_size=2)
SIGMOID = {"moe_router_score_function": "sigmoid"}
GROUPS: dict[str, Any] = {
    "num_moe_experts": 8,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk": 4,
}


def case(parallel: dict[str, Any], gate: str = "topk", **moe: Any) -> dict[str, Any]:
    return {"parallel": parallel, "moe": {**MOE, "moe_router_gate": gate, **moe}}


HASH: dict[str, Any] = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.0}

GATE_LAYOUTS: dict[str, dict[str, Any]] = {
    "EDP expert bias, groups": case(EDP, **SIGMOID, **GROUPS, moe_router_enable_expert_bias=True),
    "CP2 groups of softmax scores": case(CP2, **GROUPS),
    "EDP one expert, softmax first, scaled, logits normalized, router in fp64": case(
        EDP,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_logit_normalization=1.0,
        moe_router_dtype="fp64",
    ),
    "EDP noisy_topk": case(EDP, "noisy_topk"),
    "EDP switch, drops": case(EDP, "switch", moe_router_topk=1, moe_expert_capacity_factor=1.0),
    "PP2 switch, recompute": {
        **case(PP2, "switch", moe_router_topk=1),
        "recompute": {"granularity": "full"},
    },
    "EDP gshard, drops": case(EDP, "gshard", moe_expert_capacity_factor=1.0),
    "EDP sinkhorn": case(EDP, "sinkhorn"),
    "CP2 sinkhorn, one expert": case(CP2, "sinkhorn", moe_router_topk=1),
    "EDP swipe": case(EDP, "swipe"),
    "CP2 swipe, two workers, sigmoid": case(CP2, "swipe", moe_num_device_groups=2, **SIGMOID),
    "EDP hash": case(EDP, "hash", **HASH),
    "PP2 hash": case(PP2, "hash", **HASH),
    "EDP forced_balance": case(EDP, "forced_balance"),
    "EP2 forced_balance": case(EP2, "forced_balance"),
    "TP2 PP2 noisy_topk, jitter, recompute": {
        **case(layout(tp=2, pp=2), "noisy_topk", moe_input_jitter_eps=0.1),
        "recompute": {"granularity": "full"},
    },
}

SECOND_PAIR = ("EDP gshard, drops", "TP2 PP2 noisy_topk, jitter, recompute")
"""Those that the tests run on the second version pair too."""
