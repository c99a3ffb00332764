"""The layouts that `verify` must pass with each dispatcher; part of the table in layout_cases.py."""

from __future__ import annotations

from typing import Any

from experiments import MOE, layout

EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
SHARED = {"moe_shared_expert_intermediate_size": 32}
DROPS = {"moe_expert_capacity_factor": 0.8}

ETP2_EP2 = layout(tp=2, dp=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2)


def case(parallel: dict[str, Any], dispatcher: str, **moe: Any) -> dict[str, Any]:
    """Two layers with 8 experts, top-3."""
    settings = {**MOE, "num_moe_experts": 8, "moe_router_topk": 3, "moe_token_dispatcher_type": dispatcher}
    return {"model": {"num_layers": 2}, "parallel": parallel, "moe": {**settings, **moe}}


DISPATCH_LAYOUTS: dict[str, dict[str, Any]] = {
    "EDP deduplicated, shared experts meanwhile": case(
        layout(tp=2), "deduplicated", **SHARED, moe_shared_expert_overlap=True
    ),
    "EP2 deduplicated, drops": case(layout(dp=2, **EP2), "deduplicated", **DROPS),
    "CP2 EP2 deduplicated": case(layout(cp=2, **EP2), "deduplicated"),
    "ETP2 EP2 deduplicated, drops": case(ETP2_EP2, "deduplicated", **DROPS),
    "EDP allgather, drops": case(layout(tp=2), "allgather", **DROPS),
    "EP2 allgather, shared experts meanwhile": case(
        layout(dp=2, **EP2), "allgather", **SHARED, moe_shared_expert_overlap=True
    ),
    "CP2 EP2 allgather": case(layout(cp=2, **EP2), "allgather"),
    "ETP2 EP2 allgather": case(ETP2_EP2, "allgather"),
    "EDP auto": case(layout(tp=2), "auto"),
    "TP2 DP2 EP4 alltoall in two levels": case(
        layout(tp=2, dp=2, **EP4), "alltoall", **SHARED, moe_shared_expert_overlap=True, moe_ranks_per_node=2
    ),
    "TP4 ETP2 EP2 deduplicated in two levels": case(
        layout(tp=4, expert_model_parallel_size=2, expert_tensor_parallel_size=2),
        "deduplicated",
        **DROPS,
        moe_ranks_per_node=2,
    ),
}

SECOND_PAIR = ("EP2 deduplicated, drops", "EP2 allgather, shared experts meanwhile")
"""Those that the tests run on the second version pair too."""
