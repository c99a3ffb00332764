"""The layouts that `verify` must pass with overlapped exchanges and copied experts; part of the table in
layout_cases.py."""

from __future__ import annotations

from typing import Any

from experiments import MOE, layout

EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
SHARED = {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_overlap": True}
COPIES = {"flops_per_second": 1e6, "bytes_per_second": 1e12}
"""A slow device behind fast links: nearly every imbalance pays."""


def case(parallel: dict[str, Any], degree: int, **moe: Any) -> dict[str, Any]:
    """Two layers with 8 experts, top-3, exchanged in so many parts."""
    settings = {**MOE, "num_moe_experts": 8, "moe_router_topk": 3, "moe_overlap_degree": degree}
    return {"model": {"num_layers": 2}, "parallel": parallel, "moe": {**settings, **moe}}


OVERLAP_LAYOUTS: dict[str, dict[str, Any]] = {
    "EDP in 2 parts, shared experts meanwhile": case(layout(tp=2), 2, **SHARED),
    "EP2 in 3 parts, drops, recompute": {
        **case(layout(dp=2, **EP2), 3, moe_expert_capacity_factor=0.8),
        "recompute": {"layers_per_stage": [1]},
    },
    "TP2 DP2 EP4 in 5 parts, more than experts": case(layout(tp=2, dp=2, **EP4), 5),
    "ETP2 EP2 in 4 parts": case(
        layout(tp=2, dp=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2), 4
    ),
    "EDP, copied experts": case(layout(tp=2), 1, moe_shadowing=COPIES),
    "TP2 DP2 EP4 in 2 parts, copied experts, drops": case(
        layout(tp=2, dp=2, **EP4), 2, **SHARED, moe_shadowing=COPIES, moe_expert_capacity_factor=0.9
    ),
}

SECOND_PAIR = ("EP2 in 3 parts, drops, recompute", "EDP, copied experts")
"""Those that the tests run on the second version pair too."""
