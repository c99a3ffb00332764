"""Layers of each stage where the user says those of the first or the last one."""

from __future__ import annotations

from megatron_moe.config.origin import Problem
from megatron_moe.config.schema import Experiment

FIRST, LAST = "pipeline.num_layers_in_first_stage", "pipeline.num_layers_in_last_stage"


def is_counted(e: Experiment) -> bool:
    """Whether the user says them."""
    pipeline = e.pipeline
    return pipeline.num_layers_in_first_stage is not None or pipeline.num_layers_in_last_stage is not None


def around_counts(e: Experiment, stages: int) -> list[int] | Problem:
    """Layers of each of so many stages: the counts as given, the others even. The problem where that cannot
    be."""
    pipeline, layers = e.pipeline, e.model.num_layers
    first, last = pipeline.num_layers_in_first_stage, pipeline.num_layers_in_last_stage
    if stages == 1:
        return [layers]  # layout_rules.counts_agree compares
    counts = {key: count for key, count in ((FIRST, first), (LAST, last)) if count is not None}
    others, left = stages - len(counts), layers - sum(counts.values())
    if left == 0 or (left > 0 and others and left % others == 0):
        each = left // others if others else 0
        ends = [each if count is None else count for count in (first, last)]
        return [ends[0], *[each] * (stages - 2), ends[1]]
    beside = f"plus {LAST} " if len(counts) == 2 else ""
    if left < 0:
        text = f"{beside}is more than model.num_layers"
    elif not others:
        text = f"{beside}is {layers - left}, and not model.num_layers"
    else:
        text = f"{beside}leaves {left} of model.num_layers, which do not divide over {others} other stages"
    advice = "change them, or say pipeline.layers_per_stage: a list, or auto"
    return Problem((*counts, "model.num_layers"), text, advice)
