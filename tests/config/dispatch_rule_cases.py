"""Cases of the rules about how tokens travel, for test_rules.py."""

from __future__ import annotations

from experiment_files import MOE

TP, EP = "parallel.tensor_model_parallel_size", "parallel.expert_model_parallel_size"
DISPATCHER, NODE = "moe.moe_token_dispatcher_type", "moe.moe_ranks_per_node"
SHARED, OVERLAP = "moe.moe_shared_expert_intermediate_size", "moe.moe_shared_expert_overlap"
FOUR = [f"{TP}=4"]

DISPATCH_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "shared_expert_overlap",
        MOE,
        [f"{OVERLAP}=true"],
        [f"{SHARED}=32"],
        OVERLAP,
        f"has no effect without {SHARED}",
    ),
    (
        "shared_expert_overlap",
        MOE,
        [f"{OVERLAP}=true", f"{SHARED}=32", f"{DISPATCHER}=flex", f"{TP}=2"],
        [f"{DISPATCHER}=deduplicated"],
        OVERLAP,
        f'does not go with the kernels of {DISPATCHER} ("flex", override)',
    ),
    (
        "ranks_per_node",
        MOE,
        [*FOUR, f"{NODE}=2", f"{DISPATCHER}=allgather"],
        [f"{DISPATCHER}=auto"],
        NODE,
        f'takes an all-to-all apart, which {DISPATCHER} ("allgather", override) is not',
    ),
    (
        "ranks_per_node",
        MOE,
        [*FOUR, f"{NODE}=3"],
        [f"{NODE}=2"],
        NODE,
        "4 ranks, into nodes; use 2, or leave it out",
    ),
    ("ranks_per_node", MOE, [*FOUR, f"{NODE}=1"], [f"{NODE}=2"], NODE, "1 is one rank; use 2"),
    (
        "ranks_per_node",
        MOE,
        [*FOUR, f"{NODE}=4"],
        [f"{NODE}=null"],
        NODE,
        f"4 has no effect where {EP} (4, derived) times",
    ),
    (
        "sorted_in_a_kernel",
        MOE,
        [f"{TP}=2", "moe.moe_permute_fusion=true"],
        [f"{DISPATCHER}=flex"],
        "moe.moe_permute_fusion",
        f'true has no effect but with flex in {DISPATCHER} ("alltoall", default)',
    ),
]
