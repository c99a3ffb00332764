"""Experiments that break the rules about what is trained; see test_rules."""

from __future__ import annotations

from experiment_files import DENSE, MOE

L, P = "training.lora", "parallel."
TARGETS, DROPOUT = f"{L}.targets", f"{L}.dropout"
SIMILAR = "logging.expert_similarity=true"


def lora(*targets: str, **more: float) -> str:
    rest = "".join(f", {key}: {value}" for key, value in more.items())
    return f"{L}={{rank: 2, targets: [{', '.join(targets)}]{rest}}}"


FINETUNING_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "adapters_or_frozen_weights",
        DENSE,
        [lora("attention"), "training.freeze=[norms]"],
        ["training.freeze=null"],
        "training.freeze",
        f"has no effect beside {L}",
    ),
    ("targets_are_there", DENSE, [lora("experts")], [f"{TARGETS}=[mlp]"], TARGETS, "no layer has any"),
    ("targets_are_there", MOE, [lora("mlp")], [f"{TARGETS}=[experts]"], TARGETS, "all layers have experts"),
    (
        "targets_are_there",
        MOE,
        [lora("shared_experts")],
        ["moe.moe_shared_expert_intermediate_size=32"],
        TARGETS,
        "there are none",
    ),
    (
        "targets_are_there",
        DENSE,
        [lora("attention", "attention")],
        [f"{TARGETS}=[attention]"],
        TARGETS,
        "2 times",
    ),
    (
        "adapters_can_be_built",
        DENSE,
        [lora("attention"), "training.lora.rank=65", "model.hidden_size=64"],
        ["training.lora.rank=64"],
        "training.lora.rank",
        "the rank of the whole matrix",
    ),
    (
        "adapters_can_be_built",
        DENSE,
        [lora("attention"), "model.spec=transformer_engine"],
        ["model.spec=native"],
        L,
        "hold the norm before them",
    ),
    (
        "adapters_can_be_built",
        MOE,
        [
            lora("experts"),
            "model.hidden_size=72",
            "training.global_batch_size=16",
            "model.ffn_hidden_size=64",
            f"{P}expert_tensor_parallel_size=16",
            f"{P}expert_model_parallel_size=1",
        ],
        [f"{TARGETS}=[attention]"],
        TARGETS,
        "divisible by parallel.expert_tensor_parallel_size",
    ),
    (
        "adapters_can_be_built",
        MOE,
        [
            lora("experts"),
            f"{P}expert_model_parallel_size=2",
            "moe.moe_shadowing={flops_per_second: 1e12, bytes_per_second: 1e9}",
            "moe.moe_token_dispatcher_type=alltoall",
        ],
        ["moe.moe_shadowing=null"],
        TARGETS,
        "copies experts without their adapters",
    ),
    (
        "adapters_can_be_built",
        MOE,
        [
            lora("experts"),
            f"{P}data_parallel_size=2",
            f"{P}expert_model_parallel_size=2",
            "moe.overlap_moe_expert_parallel_comm=true",
            "training.precision=bf16",
        ],
        ["moe.overlap_moe_expert_parallel_comm=false"],
        TARGETS,
        "round differently than without",
    ),
    (
        "adapters_can_drop",
        MOE,
        [lora("experts", dropout=0.1)],
        [f"{DROPOUT}=0.0"],
        DROPOUT,
        "do not know where in the run a token stands",
    ),
    (
        "adapters_can_drop",
        DENSE,
        [lora("mlp", dropout=0.1), "recompute.modules=[mlp]"],
        ["recompute.modules=null", "recompute.granularity=full"],
        DROPOUT,
        "cannot be drawn again the same",
    ),
    (
        "adapters_can_drop",
        DENSE,
        [lora("attention", dropout=0.1), "model.mtp_num_layers=1"],
        [f"{DROPOUT}=0.0"],
        DROPOUT,
        "whose layers see other tokens",
    ),
    (
        "rates_have_weights",
        MOE,
        ["training.freeze=[experts]", "optimizer.expert_lr=1e-4"],
        ["training.freeze=[router]"],
        "optimizer.expert_lr",
        "they are frozen",
    ),
    (
        "rates_have_weights",
        MOE,
        [lora("attention"), "optimizer.expert_lr=1e-4"],
        [f"{TARGETS}=[experts]"],
        "optimizer.expert_lr",
        "does not name them",
    ),
    (
        "rates_have_weights",
        DENSE,
        [lora("attention"), "optimizer.decoupled_lr=1e-4"],
        ["optimizer.decoupled_lr=null"],
        "optimizer.decoupled_lr",
        "have no adapters",
    ),
    ("similarity_has_experts", DENSE, [SIMILAR], [], "logging.expert_similarity", "there is no section moe"),
    (
        "similarity_has_experts",
        MOE,
        [SIMILAR, lora("experts")],
        [f"{L}=null"],
        "logging.expert_similarity",
        "would be the same at every step",
    ),
]
