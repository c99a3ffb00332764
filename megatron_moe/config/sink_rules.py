"""Rules about where the metrics go beside metrics.jsonl."""

from __future__ import annotations

import re

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment


def wandb_names_are_names(e: Experiment) -> Problems:
    """Weights & Biases takes no names of another form, and would say so only when the run has started."""
    if e.logging.wandb is None:
        return
    project = e.logging.wandb.project
    if re.search(r"[/\\#?%:]", project) or len(project) > 128:
        entity, slash, rest = project.partition("/")
        advice = f"use {re.sub(r'[^A-Za-z0-9._-]+', '-', project)[:128]}"
        if slash and entity and rest and not re.search(r"[/\\#?%:]", rest):
            advice = f"for a project of {entity} use {rest}, and set logging.wandb.entity to {entity}"
        text = "is no name for a project: it must have at most 128 characters, none of them / \\ # ? % :"
        yield Problem(("logging.wandb.project",), text, advice)
    if (owner := e.logging.wandb.entity) is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", owner):
        text = "is no name for a user or a team: letters, digits, - _ . only"
        yield Problem(("logging.wandb.entity",), text, "leave it out to take the account's")


def timeline_of_a_step(e: Experiment) -> Problems:
    """The step is there, and its passes can be told apart."""
    key, last, merged = (
        "logging.timeline_iter",
        "training.train_iters",
        "moe.overlap_moe_expert_parallel_comm",
    )
    if e.logging.timeline_iter is None:
        return
    if e.logging.timeline_iter > e.training.train_iters:
        yield Problem(
            (key, last), f"is behind the last step, {last}", f"use at most {e.training.train_iters}"
        )
    if e.moe is not None and e.moe.overlap_moe_expert_parallel_comm:
        text = f"does not go with {merged}, whose schedule does not say where a pass ends"
        yield Problem((key, merged), text, "leave one of the two out")
