"""Cases of test_rules.py about how experts are chosen."""

from __future__ import annotations

from experiment_files import MOE

M = "moe."
GATE, TOPK, LOSS = f"{M}moe_router_gate", f"{M}moe_router_topk", f"{M}moe_router_load_balancing_type"
SIGMOID = f"{M}moe_router_score_function=sigmoid"
BIAS = f"{M}moe_router_enable_expert_bias"
GROUPS, CHOSEN = f"{M}moe_router_num_groups", f"{M}moe_router_group_topk"
NORMALIZATION = f"{M}moe_router_logit_normalization"
HASH = [f"{GATE}=hash", f"{LOSS}=none"]

ROUTER_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "topk_within_experts",
        MOE,
        [f"{TOPK}=9"],
        [f"{TOPK}=8"],
        TOPK,
        "9 is more than moe.num_moe_experts (8, experiment.yaml:5)",
    ),
    ("choices_of_gate", MOE, [f"{GATE}=switch"], [f"{TOPK}=1"], TOPK, "is not the 1 that"),
    ("choices_of_gate", MOE, [f"{GATE}=gshard", f"{TOPK}=4"], [f"{TOPK}=2"], TOPK, "4 is not the 2 that"),
    (
        "top1_needs_softmax_first",
        MOE,
        [f"{TOPK}=1"],
        [f"{M}moe_router_pre_softmax=true"],
        TOPK,
        "1 expert a token gives the router no gradient",
    ),
    (
        "top1_needs_softmax_first",
        MOE,
        [f"{TOPK}=1", f"{GATE}=noisy_topk"],
        [f"{TOPK}=2"],
        TOPK,
        "1 expert a token gives the router no gradient",
    ),
    (
        "keys_of_gate",
        MOE,
        [f"{GATE}=switch", f"{TOPK}=1", SIGMOID],
        [f"{GATE}=topk"],
        f"{M}moe_router_score_function",
        f'has no effect under {GATE} ("switch", override); use {GATE} topk or swipe or forced_balance',
    ),
    (
        "keys_of_gate",
        MOE,
        [f"{GATE}=gshard", f"{M}moe_router_pre_softmax=true"],
        [f"{M}moe_router_pre_softmax=false"],
        f"{M}moe_router_pre_softmax",
        "true has no effect under",
    ),
    (
        "keys_of_gate",
        MOE,
        [*HASH, f"{M}moe_input_jitter_eps=0.01"],
        [f"{M}moe_input_jitter_eps=0"],
        f"{M}moe_input_jitter_eps",
        "0.01 has no effect under",
    ),
    (
        "keys_of_gate",
        MOE,
        [*HASH, f"{M}moe_z_loss_coeff=0.1"],
        [f"{M}moe_z_loss_coeff=0"],
        f"{M}moe_z_loss_coeff",
        "0.1 has no effect under",
    ),
    (
        "keys_of_gate",
        MOE,
        [f"{GATE}=forced_balance", SIGMOID, f"{BIAS}=true"],
        [f"{GATE}=topk"],
        BIAS,
        f"use {GATE} topk, or leave it out",
    ),
    (
        "scores_of_gate",
        MOE,
        [SIGMOID, f"{M}moe_router_pre_softmax=true"],
        [f"{M}moe_router_score_function=softmax"],
        f"{M}moe_router_pre_softmax",
        "has no effect on the sigmoid",
    ),
    ("hash_learns_nothing", MOE, HASH[:1], HASH[1:], LOSS, f"has nothing to move: {GATE}"),
    (
        "expert_bias_needs_sigmoid",
        MOE,
        [f"{BIAS}=true"],
        [SIGMOID],
        BIAS,
        "does not go with a softmax",
    ),
    (
        "expert_bias_needs_sigmoid",
        MOE,
        [f"{M}moe_router_bias_update_rate=0.1"],
        [f"{BIAS}=true", SIGMOID],
        f"{M}moe_router_bias_update_rate",
        "has no effect without",
    ),
    ("groups_of_experts", MOE, [f"{GROUPS}=4"], [f"{CHOSEN}=2"], GROUPS, f"4 needs {CHOSEN}"),
    (
        "groups_of_experts",
        MOE,
        [f"{GROUPS}=3", f"{CHOSEN}=1"],
        [f"{GROUPS}=4"],
        GROUPS,
        "3 does not divide moe.num_moe_experts",
    ),
    (
        "groups_of_experts",
        MOE,
        [f"{GROUPS}=2", f"{CHOSEN}=4", f"{TOPK}=4"],
        [f"{CHOSEN}=2"],
        CHOSEN,
        "4 is more than",
    ),
    (
        "groups_of_experts",
        MOE,
        [f"{GROUPS}=4", f"{CHOSEN}=2", f"{TOPK}=5"],
        [f"{TOPK}=4"],
        CHOSEN,
        "2 groups of 2 experts do not hold moe.moe_router_topk (5, override) choices",
    ),
    (
        "logit_normalization",
        MOE,
        [f"{NORMALIZATION}_epsilon=1e-3"],
        [f"{NORMALIZATION}=1.0"],
        f"{NORMALIZATION}_epsilon",
        "has no effect without",
    ),
    (
        "logit_normalization",
        MOE,
        [
            f"{NORMALIZATION}=1.0",
            "moe.num_moe_experts=1",
            f"{TOPK}=1",
            f"{M}moe_router_pre_softmax=true",
        ],
        ["moe.num_moe_experts=2"],
        NORMALIZATION,
        "1.0 has no standard deviation over moe.num_moe_experts (1, override)",
    ),
    (
        "workers_of_swipe",
        MOE,
        [f"{GATE}=swipe", f"{M}moe_num_device_groups=3"],
        [f"{M}moe_num_device_groups=4"],
        f"{M}moe_num_device_groups",
        "3 does not divide moe.num_moe_experts",
    ),
    (
        "vocabulary_of_marked_tokens",
        MOE,
        [f"{M}moe_input_jitter_eps=0.1", "model.vocab_size=4194305"],
        ["model.vocab_size=4194304"],
        "model.vocab_size",
        f"4194305 is more than the 4,194,304 numbers that {M}moe_input_jitter_eps",
    ),
    (
        "marked_tokens_reach_routers",
        MOE,
        [f"{GATE}=gshard", f"{M}moe_token_dispatcher_type=flex", "parallel.tensor_model_parallel_size=2"],
        [f"{M}moe_token_dispatcher_type=alltoall"],
        GATE,
        "which moe.moe_token_dispatcher_type",
    ),
]
