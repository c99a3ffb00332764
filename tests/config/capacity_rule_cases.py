"""Cases of the rules about the capacity of experts, for test_rules.py."""

from __future__ import annotations

from experiment_files import MOE

FACTOR, EVAL = "moe.moe_expert_capacity_factor", "moe.moe_eval_capacity_factor"
POLICY, PADDED = "moe.moe_token_drop_policy", "moe.moe_pad_expert_input_to_capacity"
WOULD_DROP, DEGREE = "moe.moe_would_drop_capacity_factor", "moe.moe_overlap_degree"

CAPACITY_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "capacity_that_is_used",
        MOE,
        [f"{POLICY}=position"],
        [f"{FACTOR}=1.25"],
        POLICY,
        f'"position" has no effect where nothing is dropped: {FACTOR} sets no limit',
    ),
    (
        "capacity_that_is_used",
        MOE,
        [f"{POLICY}=batch_priority", f"{FACTOR}=auto"],
        [f"{EVAL}=-2"],
        POLICY,
        "no effect",
    ),
    ("capacity_that_is_used", MOE, [f"{PADDED}=true"], [f"{FACTOR}=auto"], PADDED, f"needs {FACTOR}"),
    (
        "capacity_that_is_used",
        MOE,
        [f"{WOULD_DROP}=1.5", f"{FACTOR}=2"],
        [f"{FACTOR}=0"],
        WOULD_DROP,
        "no effect",
    ),
    (
        "padded_experts",
        MOE,
        [f"{PADDED}=true", f"{FACTOR}=1.0", f"{DEGREE}=5", "parallel.tensor_model_parallel_size=2"],
        [f"{DEGREE}=4"],
        DEGREE,
        "would fill up; use at most 4, the experts of a rank",
    ),
    (
        "padded_experts",
        MOE,
        [
            f"{PADDED}=true",
            f"{FACTOR}=1.0",
            "moe.moe_token_dispatcher_type=flex",
            "parallel.data_parallel_size=2",
            "parallel.expert_model_parallel_size=2",
            "training.precision=bf16",
        ],
        ["moe.moe_token_dispatcher_type=alltoall"],
        PADDED,
        "does not go with moe.moe_token_dispatcher_type",
    ),
]
