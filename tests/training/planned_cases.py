"""Uneven stages with another recomputation on each, as the planner makes them, and what it makes itself."""

from __future__ import annotations

from typing import Any

from experiments import layout

EP2 = {"expert_model_parallel_size": 2}
AUTO = {"pipeline": {"layers_per_stage": "auto"}, "recompute": {"layers_per_stage": "auto"}}


def of_memory(gib: float) -> dict[str, Any]:
    """A machine that has so much for each rank."""
    return {"cluster": {"memory_gib": gib}}


PLANNED_LAYOUTS: dict[str, dict[str, Any]] = {
    "PP2 planned": {"parallel": layout(pp=2), **AUTO},
    "PP2 uneven, recompute uniform": {
        "parallel": layout(pp=2),
        "pipeline": {"layers_per_stage": [3, 1]},
        "recompute": {"layers_per_stage": [3, 1], "method": "uniform"},
    },
    "PP2 uneven, recompute of modules": {
        "parallel": layout(pp=2),
        "pipeline": {"layers_per_stage": [1, 3]},
        "recompute": {"modules": ["layernorm", "moe_act"]},
    },
    "PP2 VPP2 uneven, recompute": {
        "parallel": layout(pp=2, vpp=2),
        "pipeline": {"layers_per_stage": [1, 2, 1, 0]},
        "recompute": {"layers_per_stage": [1, 2]},
    },
    "TP2 PP2 VPP2 planned": {"parallel": layout(tp=2, pp=2, vpp=2), **AUTO},
    "PP4 planned": {"parallel": layout(pp=4), **AUTO},
    "PP2 EP2 planned, memory short": {
        "parallel": layout(pp=2, dp=2, **EP2),
        **AUTO,
        "launch": of_memory(0.00115),
    },
}
