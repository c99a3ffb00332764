"""Cases of test_rules.py about where the metrics go."""

from __future__ import annotations

from experiment_files import DENSE

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
]
