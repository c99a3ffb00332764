"""Cases of test_rules.py about where the metrics go."""

from __future__ import annotations

from experiment_files import DENSE, MOE

MERGED = [
    "moe.overlap_moe_expert_parallel_comm=true",
    "parallel.expert_model_parallel_size=2",
    "parallel.data_parallel_size=2",
    "training.precision=bf16",
]
WANDB = DENSE + "\nlogging: {wandb: {project: moe}}\n"

SINK_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "wandb_names_are_names",
        WANDB,
        ["logging.wandb.project=team/moe"],
        ["logging.wandb.project=moe", "logging.wandb.entity=team"],
        "logging.wandb.project",
        "for a project of team use moe, and set logging.wandb.entity to team",
    ),
    (
        "wandb_names_are_names",
        WANDB,
        ["logging.wandb.project='moe: 50 %'"],
        ["logging.wandb.project=moe-50-"],
        "logging.wandb.project",
        "use moe-50-",
    ),
    (
        "wandb_names_are_names",
        WANDB,
        ["logging.wandb.entity=a/b"],
        ["logging.wandb.entity=a-b"],
        "logging.wandb.entity",
        "leave it out to take the account's",
    ),
    (
        "timeline_of_a_step",
        DENSE,
        ["training.train_iters=5", "logging.timeline_iter=6"],
        ["logging.timeline_iter=5"],
        "logging.timeline_iter",
        "6 is behind the last step, training.train_iters (5, override); use at most 5",
    ),
    (
        "timeline_of_a_step",
        MOE,
        [*MERGED, "training.train_iters=5", "logging.timeline_iter=1"],
        ["moe.overlap_moe_expert_parallel_comm=false"],
        "logging.timeline_iter",
        "does not go with moe.overlap_moe_expert_parallel_comm",
    ),
]
