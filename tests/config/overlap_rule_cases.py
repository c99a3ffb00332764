"""Cases of the rules about overlapped communication, for test_rules.py."""

from __future__ import annotations

from experiment_files import MOE

TP, PP, VPP = (f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline", "virtual_pipeline"))
ETP = "parallel.expert_tensor_parallel_size"
DEGREE, DISPATCHER = "moe.moe_overlap_degree", "moe.moe_token_dispatcher_type"
BATCHES, SHADOWING = "moe.overlap_moe_expert_parallel_comm", "moe.moe_shadowing"
TWO, BF16 = f"{TP}=2", "training.precision=bf16"
RATES = f"{SHADOWING}={{flops_per_second: 1e12, bytes_per_second: 1e9}}"
AT_ONCE = [TWO, BF16, f"{BATCHES}=true"]

OVERLAP_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    ("overlap_degree", MOE, [f"{DEGREE}=2"], [TWO], DEGREE, "no token travels"),
    (
        "overlap_degree",
        MOE,
        [TWO, f"{DEGREE}=2", f"{DISPATCHER}=allgather"],
        [f"{DISPATCHER}=alltoall"],
        DEGREE,
        f'takes the all-to-all apart, which {DISPATCHER} ("allgather", override) is not',
    ),
    ("shadowing", MOE, [RATES], [TWO], SHADOWING, "every rank has all experts"),
    (
        "shadowing",
        MOE,
        [f"{TP}=4", RATES, f"{ETP}=2", "parallel.expert_model_parallel_size=2"],
        [f"{ETP}=1", "parallel.expert_model_parallel_size=4"],
        SHADOWING,
        "copies whole experts",
    ),
    (
        "shadowing",
        MOE,
        [TWO, RATES, f"{SHADOWING}.maximum=64"],
        [f"{SHADOWING}.maximum=1"],
        f"{SHADOWING}.maximum",
        "use at most",
    ),
    ("overlapped_batches", MOE, [BF16, f"{BATCHES}=true"], [TWO], BATCHES, "above 1"),
    (
        "overlapped_batches",
        MOE,
        [*AT_ONCE, "training.precision=fp32"],
        ["training.precision=auto"],
        BATCHES,
        "does not work with training.precision",
    ),
    ("overlapped_batches", MOE, [*AT_ONCE, f"{PP}=2"], [f"{VPP}=2"], BATCHES, f"needs {VPP}"),
    (
        "overlapped_batches",
        MOE,
        [*AT_ONCE, "recompute.modules=[moe]"],
        ["recompute.modules=[moe_act]"],
        BATCHES,
        "cannot be computed again",
    ),
    (
        "overlapped_batches",
        MOE,
        [*AT_ONCE, "moe.moe_input_jitter_eps=0.01"],
        ["moe.moe_input_jitter_eps=null"],
        BATCHES,
        "nothing but hidden states",
    ),
]
