"""Cases of the rules about multi-token prediction and counted stages, for test_rules.py."""

from __future__ import annotations

from experiment_files import DENSE, MOE

MTP, STAGE = "model.mtp_num_layers", "pipeline.mtp_stage"
LAYERS, FIRST = "pipeline.layers_per_stage", "pipeline.num_layers_in_first_stage"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
OVERLAP = "moe.overlap_moe_expert_parallel_comm"
KIND, TIED = "model.position_embedding_type", "model.untie_embeddings_and_output_weights"
ONE = f"{MTP}=1"

MTP_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    ("keys_of_mtp", DENSE, [f"{STAGE}=0"], [ONE], STAGE, f"has no effect without {MTP}"),
    (
        "keys_of_mtp",
        DENSE,
        ["model.mtp_loss_scaling_factor=0.3"],
        [ONE],
        "model.mtp_loss_scaling_factor",
        f"0.3 has no effect without {MTP}",
    ),
    ("mtp_can_be_trained", DENSE, [f"{MTP}=64"], [f"{MTP}=63"], MTP, "the last layer would have no token"),
    (
        "mtp_can_be_trained",
        DENSE,
        [ONE, f"{KIND}=learned_absolute"],
        [f"{KIND}=rope"],
        KIND,
        "would learn other positions",
    ),
    ("mtp_can_be_trained", DENSE, [ONE, f"{TIED}=false", f"{PP}=2"], [f"{PP}=1"], TIED, "matrix twice"),
    (
        "mtp_can_be_trained",
        DENSE,
        [ONE, "model.spec=transformer_engine", "training.precision=bf16", "training.fp8=hybrid"],
        [],
        "training.fp8",
        "not run in FP8 here",
    ),
    (
        "mtp_can_be_trained",
        MOE,
        [ONE, f"{OVERLAP}=true", "parallel.tensor_model_parallel_size=2", "training.precision=bf16"],
        [f"{OVERLAP}=false"],
        OVERLAP,
        "Megatron-Core's own layers apart",
    ),
    (
        "mtp_stage_can_be",
        DENSE,
        [ONE, f"{PP}=4", f"{STAGE}=1"],
        [f"{STAGE}=3"],
        STAGE,
        "1 is neither the last of",
    ),
    (
        "mtp_stage_can_be",
        DENSE,
        [ONE, f"{PP}=2", f"{LAYERS}=[4, 0]", f"{STAGE}=0"],
        [f"{STAGE}=1"],
        STAGE,
        f"is on the first of {PP} (2, override)",
    ),
    (
        "mtp_stage_can_be",
        DENSE,
        [ONE, f"{PP}=4", f"{STAGE}=2"],
        [f"{LAYERS}=[2, 2, 0, 0]"],
        STAGE,
        f"is before a layer in {LAYERS}",
    ),
    (
        "counts_agree",
        DENSE,
        [f"{PP}=2", f"{FIRST}=1", f"{LAYERS}=[2, 2]"],
        [f"{LAYERS}=[1, 3]"],
        FIRST,
        f"1 is not what {LAYERS} ([2, 2], override) says of this stage",
    ),
    (
        "counts_agree",
        DENSE,
        [f"{PP}=2", f"{FIRST}=1", f"{LAYERS}=auto"],
        [f"{LAYERS}=[1, 3]"],
        FIRST,
        "lets the planner say it",
    ),
]
