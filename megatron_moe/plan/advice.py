"""What would help where stages and recomputation that the user gave do not fit the memory."""

from __future__ import annotations

from megatron_moe.config.errors import InputError
from megatron_moe.config.layout_string import AUTO
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.auto import placed
from megatron_moe.plan.profile import profile_of


def advice(experiment: Experiment) -> str:
    """A line: lists with which a filled experiment fits, else what the planner says is missing."""
    whole_layers = {"layers_per_stage": AUTO, "granularity": "full", "modules": []}
    recompute = experiment.recompute.model_copy(update=whole_layers)
    stages = {"layers_per_stage": AUTO, "num_layers_in_first_stage": None, "num_layers_in_last_stage": None}
    counted = experiment.model_copy(update={"recompute": recompute})
    moved = counted.model_copy(update={"pipeline": experiment.pipeline.model_copy(update=stages)})
    measured = profile_of(experiment)
    says = ""
    for changed in (counted, moved):
        try:
            found = placed(changed, measured)
        except InputError as error:
            says = error.problems[0]
            continue
        lists = [f"recompute.layers_per_stage='{found.recompute.layers_per_stage}'"]
        if changed is moved:
            lists.insert(0, f"pipeline.layers_per_stage='{found.pipeline.layers_per_stage}'")
        instead = " instead of recompute.modules" if experiment.recompute.modules else ""
        return f"{' with '.join(lists)}{instead} would do; so would auto."
    return says
