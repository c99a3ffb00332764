"""Experiments that break the rules about Transformer Engine, offloading and fused kernels; see test_rules."""

from __future__ import annotations

from experiment_files import DENSE, MOE

TE = "model.spec=transformer_engine"
PP, OFFLOADED = "parallel.pipeline_model_parallel_size", "recompute.cpu_offloading_num_layers"

DEVICE_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "blocks_of_transformer_engine",
        DENSE,
        ["training.fp8=hybrid"],
        [TE],
        "training.fp8",
        'does not work with the blocks of model.spec ("native", default)',
    ),
    (
        "blocks_of_transformer_engine",
        DENSE,
        [f"{OFFLOADED}=2"],
        [f"{OFFLOADED}=0"],
        OFFLOADED,
        "set model.spec to transformer_engine, or leave it out",
    ),
    *(
        (
            "dead_without_their_switch",
            MOE,
            [f"{key}={value}"],
            repaired,
            key,
            f"has no effect without {switch}",
        )
        for key, value, switch, repaired in (
            ("training.fp8_recipe", "mxfp8", "training.fp8", ["training.fp8=e4m3", TE]),
            (
                "optimizer.exp_avg_dtype",
                "bf16",
                "optimizer.use_precision_aware_optimizer",
                ["optimizer.use_precision_aware_optimizer=true"],
            ),
            ("optimizer.exp_avg_sq_dtype", "fp8", "optimizer.use_precision_aware_optimizer", []),
            ("optimizer.main_grads_dtype", "bf16", "optimizer.use_precision_aware_optimizer", []),
            (
                "optimizer.optimizer_offload_fraction",
                "0.5",
                "optimizer.optimizer_cpu_offload",
                ["optimizer.optimizer_cpu_offload=true"],
            ),
        )
    ),
    (
        "dead_without_their_switch",
        MOE,
        ["moe.moe_flex_dispatcher_backend=hybridep"],
        ["moe.moe_token_dispatcher_type=flex", "parallel.tensor_model_parallel_size=2"],
        "moe.moe_flex_dispatcher_backend",
        'has no effect under moe.moe_token_dispatcher_type ("alltoall", default)',
    ),
    (
        "dead_without_their_switch",
        MOE,
        ["model.apply_rope_fusion=true", "model.position_embedding_type=none"],
        ["model.position_embedding_type=rope"],
        "model.apply_rope_fusion",
        "has no effect under model.position_embedding_type",
    ),
    (
        "main_grads_as_reduced",
        DENSE,
        ["optimizer.use_precision_aware_optimizer=true", "optimizer.main_grads_dtype=bf16"],
        ["parallel.grad_reduce_in_fp32=false"],
        "optimizer.main_grads_dtype",
        "does not go with parallel.grad_reduce_in_fp32 (true, default)",
    ),
    (
        "one_optimizer_state",
        DENSE,
        ["optimizer.use_precision_aware_optimizer=true", "optimizer.optimizer_cpu_offload=true"],
        ["optimizer.use_precision_aware_optimizer=false"],
        "optimizer.optimizer_cpu_offload",
        "keep one of the two",
    ),
    (
        "offloaded_state_needs_bf16",
        DENSE,
        ["optimizer.optimizer_cpu_offload=true", "training.precision=fp32"],
        ["training.precision=auto"],
        "optimizer.optimizer_cpu_offload",
        'does not work with training.precision ("fp32", override); set training.precision to bf16',
    ),
    ("offloaded_layers", DENSE, [TE, f"{OFFLOADED}=4"], [f"{OFFLOADED}=3"], OFFLOADED, "use at most 3"),
    (
        "offloaded_layers",
        DENSE,
        [TE, f"{OFFLOADED}=1", f"{PP}=2"],
        [f"{PP}=1"],
        OFFLOADED,
        f"does not go with {PP} above 1".replace(PP, f"{PP} (2, override)"),
    ),
    (
        "offloaded_layers",
        DENSE,
        [TE, f"{OFFLOADED}=1", "recompute.layers_per_stage=[1]"],
        ["recompute.layers_per_stage=[0]"],
        OFFLOADED,
        "does not go with recompute.layers_per_stage ([1], override)",
    ),
    (
        "flex_has_ranks_to_reach",
        MOE,
        ["moe.moe_token_dispatcher_type=flex"],
        ["parallel.expert_model_parallel_size=2"],
        "moe.moe_token_dispatcher_type",
        "use alltoall, or spread the experts over ranks",
    ),
]
"""Rule, experiment, overrides that break it, and that repair it; key that is blamed, words of the message."""
