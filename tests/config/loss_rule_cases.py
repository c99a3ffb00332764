"""Cases of test_rules.py about balancing losses and their coefficients."""

from __future__ import annotations

from experiment_files import MOE

M = "moe."
LOSS, COEFFICIENT = f"{M}moe_router_load_balancing_type", f"{M}moe_aux_loss_coeff"
GROUPS = f"{M}moe_num_device_groups"
TWO = f"{LOSS}=[aux_loss, seq_aux_loss]"

LOSS_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    ("losses_named_once", MOE, [f"{LOSS}=[]"], [f"{LOSS}=none"], LOSS, "[] names no loss; write none"),
    (
        "losses_named_once",
        MOE,
        [f"{LOSS}=[aux_loss, none]"],
        [f"{LOSS}=[aux_loss]"],
        LOSS,
        "holds none, which is no loss",
    ),
    (
        "losses_named_once",
        MOE,
        [f"{LOSS}=[aux_loss, seq_aux_loss, aux_loss]"],
        [TWO],
        LOSS,
        "names aux_loss more than once",
    ),
    (
        "coefficient_for_each_loss",
        MOE,
        [TWO, f"{COEFFICIENT}=[0.1]"],
        [f"{COEFFICIENT}=[0.1, {{xi: 0.3}}]"],
        COEFFICIENT,
        f"[0.1] has not as many entries as {LOSS}",
    ),
    (
        "coefficient_for_each_loss",
        MOE,
        [f"{COEFFICIENT}=[0.1, 0.2]"],
        [f"{COEFFICIENT}=[0.1]"],
        COEFFICIENT,
        f'entries as {LOSS} ("aux_loss", default) names losses; give it 1, or',
    ),
    (
        "coefficient_for_each_loss",
        MOE,
        [f"{LOSS}=none", f"{COEFFICIENT}.xi=0.3"],
        [TWO],
        COEFFICIENT,
        "has no effect where",
    ),
    (
        "load_loss_needs_noise",
        MOE,
        [f"{LOSS}=load_loss"],
        [f"{M}moe_router_gate=noisy_topk"],
        LOSS,
        "needs the noise of a gate, which moe.moe_router_gate",
    ),
    (
        "device_groups",
        MOE,
        [f"{LOSS}=[aux_loss, communication_aux_loss]"],
        [f"{GROUPS}=4"],
        LOSS,
        f"needs {GROUPS} for its communication_aux_loss; set that to 1, 2, 4 or 8",
    ),
    (
        "device_groups",
        MOE,
        [f"{LOSS}=device_aux_loss", f"{GROUPS}=3"],
        [f"{GROUPS}=2"],
        GROUPS,
        "3 does not divide moe.num_moe_experts",
    ),
    (
        "device_groups",
        MOE,
        [f"{GROUPS}=2"],
        [f"{LOSS}=device_aux_loss"],
        GROUPS,
        "2 has no effect without one of device_aux_loss, communication_aux_loss",
    ),
]
