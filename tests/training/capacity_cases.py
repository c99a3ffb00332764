"""Layouts under which experts have a limited capacity, for layout_cases.py."""

from __future__ import annotations

from typing import Any

from experiments import MOE, layout

EP2 = {"expert_model_parallel_size": 2}


def _moe(
    factor: float | str, policy: str = "probs", *, overlap_degree: int = 1, filled_up: bool = False
) -> dict[str, Any]:
    return {
        **MOE,
        "moe_expert_capacity_factor": factor,
        "moe_token_drop_policy": policy,
        "moe_overlap_degree": overlap_degree,
        "moe_pad_expert_input_to_capacity": filled_up,
    }


CAPACITY_LAYOUTS: dict[str, dict[str, Any]] = {
    "EDP drops": {"parallel": layout(tp=2), "moe": _moe(1.0)},
    "EDP drops the last, filled up": {"parallel": layout(tp=2), "moe": _moe(0.8, "position", filled_up=True)},
    "EDP drops in V-MoE's order": {"parallel": layout(tp=2), "moe": _moe(0.8, "batch_priority")},
    "EDP auto, filled up, in parts": {
        "parallel": layout(tp=2),
        "moe": _moe("auto", overlap_degree=2, filled_up=True),
    },
    "EDP negative, filled up": {"parallel": layout(tp=2), "moe": _moe(-0.8, filled_up=True)},
    "EP2 over DP2 drops, filled up": {"parallel": layout(dp=2, **EP2), "moe": _moe(1.0, filled_up=True)},
    "CP2 drops the last": {"parallel": layout(cp=2), "moe": _moe(1.0, "position")},
    "CP2 EP2 drops in V-MoE's order, filled up": {
        "parallel": layout(cp=2, **EP2),
        "moe": _moe(-0.8, "batch_priority", filled_up=True),
    },
    "TP2 CP2 EP4 drops": {
        "parallel": layout(tp=2, cp=2, expert_model_parallel_size=4),
        "moe": _moe(0.8),
    },
}

SECOND_PAIR = ("EDP drops the last, filled up",)
