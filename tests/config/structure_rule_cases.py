"""Cases of the rules about the structure of the model, for test_rules.py."""

from __future__ import annotations

from experiment_files import MOE

FREQ, FIRST = "moe.moe_layer_freq", "moe.moe_first_k_dense_layers"
SHARED, GATE = "moe.moe_shared_expert_intermediate_size", "moe.moe_shared_expert_gate"
ENGINE = "model.spec=transformer_engine"

STRUCTURE_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    ("moe_layer_list_length", MOE, [f"{FREQ}=[1, 0]"], [f"{FREQ}=[1, 0, 1, 0]"], FREQ, "has 2 entries"),
    ("moe_layer_list_length", MOE, [f"{FREQ}=[0, 0, 0, 0]"], ["moe=null"], FREQ, "names no MoE layer"),
    (
        "first_dense_layers",
        MOE,
        [f"{FREQ}=[0, 1, 1, 1]", f"{FIRST}=1"],
        [f"{FIRST}=0"],
        FIRST,
        f"1 stands beside a list in {FREQ}",
    ),
    (
        "first_dense_layers",
        MOE,
        [f"{FIRST}=3", f"{FREQ}=2"],
        [f"{FIRST}=2"],
        FIRST,
        "leaves no MoE layer of model.num_layers (4, experiment.yaml:2) under moe.moe_layer_freq (2, "
        "override); use at most 2",
    ),
    (
        "shared_expert_gate_has_experts",
        MOE,
        [f"{GATE}=true"],
        [f"{SHARED}=32"],
        GATE,
        f"has no effect without {SHARED}",
    ),
    (
        "experts_of_transformer_engine",
        MOE,
        [ENGINE, "moe.moe_expert_activation=relu"],
        ["moe.moe_expert_activation=swiglu"],
        "moe.moe_expert_activation",
        '"relu" is not model.activation ("swiglu", default), which the experts of',
    ),
    (
        "experts_of_transformer_engine",
        MOE,
        [ENGINE, "moe.moe_expert_dropout=0.1"],
        ["model.spec=native"],
        "moe.moe_expert_dropout",
        '0.1 is not in the experts of model.spec ("transformer_engine", override)',
    ),
]
