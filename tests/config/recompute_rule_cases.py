"""Experiments that break the rules about recompute and overlap; see test_rules."""

from __future__ import annotations

from experiment_files import DENSE, MOE

GRANULARITY, COUNTS = "recompute.granularity", "recompute.layers_per_stage"
MODULES, METHOD = "recompute.modules", "recompute.method"
SHARED = "moe.moe_shared_expert_intermediate_size"
GATHER, REDUCE = "parallel.overlap_param_gather", "parallel.overlap_grad_reduce"
TE = "model.spec=transformer_engine"

RECOMPUTE_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "recompute_said_once",
        DENSE,
        [f"{GRANULARITY}=full", f"{COUNTS}=[0]"],
        [f"{COUNTS}=null"],
        GRANULARITY,
        f"recomputes nothing under {COUNTS} ([0], override)",
    ),
    (
        "recompute_said_once",
        DENSE,
        [f"{GRANULARITY}=none", f"{COUNTS}=[2]"],
        [f"{GRANULARITY}=full"],
        COUNTS,
        f'is not read under {GRANULARITY} ("none", override)',
    ),
    (
        "recompute_said_once",
        DENSE,
        [f"{GRANULARITY}=selective", f"{MODULES}=[]"],
        [f"{MODULES}=null"],
        MODULES,
        "is empty",
    ),
    (
        "recompute_said_once",
        DENSE,
        [f"{MODULES}=[mlp]", f"{COUNTS}=[2]"],
        [f"{COUNTS}=null"],
        MODULES,
        f'is not read under {GRANULARITY} ("full", derived)',
    ),
    (
        "recompute_said_once",
        DENSE,
        [f"{GRANULARITY}=selective", f"{METHOD}=uniform"],
        [f"{GRANULARITY}=full"],
        METHOD,
        "is about whole layers",
    ),
    ("modules_are_there", DENSE, [f"{MODULES}=[mlp, mlp]"], [f"{MODULES}=[mlp]"], MODULES, "names mlp twice"),
    *(
        ("modules_are_there", text, [f"{MODULES}=[{name}]", *more], repaired, MODULES, words)
        for text, name, more, repaired, words in (
            (DENSE, "moe_act", [], [f"{MODULES}=[mlp]"], "names moe_act, and there is no section moe"),
            (
                MOE,
                "mlp",
                [],
                ["moe.moe_layer_freq=2"],
                "names mlp, and moe.moe_layer_freq (1, default) leaves",
            ),
            (MOE, "shared_experts", [], [f"{SHARED}=32"], f"names shared_experts, and {SHARED}"),
            (MOE, "moe, moe_act", [], [f"{MODULES}=[moe]"], "names moe_act beside moe, which includes it"),
        )
    ),
    (
        "modules_can_be_recomputed",
        DENSE,
        [f"{MODULES}=[layernorm]", TE],
        ["model.spec=native"],
        MODULES,
        "keep no output of norms in dense layers",
    ),
    (
        "modules_can_be_recomputed",
        MOE,
        [f"{MODULES}=[layernorm]", TE, "training.fp8=hybrid"],
        ["training.fp8_recipe=tensorwise"],
        MODULES,
        'goes with any training.fp8_recipe ("delayed", default) but this one',
    ),
    (
        "param_gather_needs_grad_reduce",
        DENSE,
        [f"{GATHER}=true"],
        [f"{REDUCE}=true"],
        GATHER,
        f"needs {REDUCE} (false, default)",
    ),
]
