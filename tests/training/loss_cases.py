"""Layouts of layout_cases.py with every balancing loss, and with every kind of coefficient."""

from __future__ import annotations

from typing import Any

from experiments import MOE, layout

ADAPTIVE = {"initial": 0.3, "xi": 0.5, "maximum": 0.2, "beta": 0.5}
SCHEDULED = {"start": 0.5, "end": 0.0, "iterations": 5, "style": "cosine"}
SIGMOID = {"moe_router_score_function": "sigmoid"}


def losses(*names: str, coefficient: Any = 0.5, **moe: Any) -> dict[str, Any]:
    """The section moe with a sum of losses."""
    return {**MOE, "moe_router_load_balancing_type": list(names), "moe_aux_loss_coeff": coefficient, **moe}


OF_A_MICROBATCH = ("seq_aux_loss", "skywork_aux_loss", "gshard_aux_loss", "importance_loss")
OF_DEVICES = ("device_aux_loss", "communication_aux_loss")
CARRIED = losses(
    "aux_loss",
    "global_aux_loss",
    coefficient=[ADAPTIVE, 0.5],
    moe_z_loss_coeff=SCHEDULED,
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=0.05,
    **SIGMOID,
)
"""All that routers carry from one iteration to the next."""

LOSS_LAYOUTS: dict[str, dict[str, Any]] = {
    "EDP sequence-wise, Skywork's, GShard's, importance": {
        "parallel": layout(tp=2),
        "moe": losses(*OF_A_MICROBATCH),
    },
    "EDP devices and what is sent to them, sigmoid, drops": {
        "parallel": layout(tp=2),
        "moe": losses(
            *OF_DEVICES,
            num_moe_experts=8,
            moe_router_num_groups=4,
            moe_router_group_topk=2,
            moe_expert_capacity_factor=1.0,
            **SIGMOID,
        ),
    },
    "EDP importance and load of noisy_topk": {
        "parallel": layout(tp=2),
        "moe": losses("importance_loss", "load_loss", moe_router_gate="noisy_topk"),
    },
    "CP2 sequence-wise, devices, load": {
        "parallel": layout(cp=2),
        "moe": losses(
            "seq_aux_loss", "load_loss", *OF_DEVICES, moe_router_gate="noisy_topk", moe_num_device_groups=2
        ),
    },
}
