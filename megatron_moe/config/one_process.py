"""An experiment as one process computes it: without a layout, and what has no meaning without one."""

from __future__ import annotations

import json

from megatron_moe.config.defaults import fill
from megatron_moe.config.schema import Experiment, MoE, Parallel, Pipeline, Recompute

_WITHOUT_LAYOUT = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.context_parallel_size=1",
    "parallel.expert_model_parallel_size=1",
    "parallel.expert_tensor_parallel_size=1",
    "parallel.data_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
    "pipeline.layers_per_stage=null",
    "pipeline.num_layers_in_first_stage=null",
    "pipeline.num_layers_in_last_stage=null",
    "pipeline.mtp_stage=null",
    "recompute.granularity=none",
    "recompute.layers_per_stage=null",
    "recompute.modules=null",
)
_ABOUT_SENDS = (
    "moe_token_dispatcher_type",
    "moe_flex_dispatcher_backend",
    "moe_ranks_per_node",
    "moe_overlap_degree",
    "moe_shadowing",
    "overlap_moe_expert_parallel_comm",
    "moe_permute_fusion",
)
"""Keys of the section `moe` about how tokens travel, which one process has nobody to do with."""


def in_one_process(experiment: Experiment) -> list[str]:
    """The overrides that take an experiment's layout away, and what has no meaning without one."""
    changed = _changed_sends(experiment.moe)
    return [*_WITHOUT_LAYOUT, *(f"moe.{name}={json.dumps(value)}" for name, value in changed.items())]


def bare_model(experiment: Experiment) -> Experiment:
    """The experiment's model in one process, in float32 and of blocks that run everywhere: what its weights
    are depends on nothing else. Adapters are left out."""
    model, moe, training = experiment.model, experiment.moe, experiment.training
    alone = {
        "parallel": Parallel(),
        "pipeline": Pipeline(),
        "recompute": Recompute(),
        "model": model.model_copy(update={"spec": "native", "apply_rope_fusion": False}),
        "moe": moe and moe.model_copy(update=_changed_sends(moe)),
        "training": training.model_copy(
            update={
                "precision": "fp32",
                "fp8": None,
                "gradient_accumulation_fusion": False,
                "freeze": None,
                "lora": None,
            }
        ),
    }
    return fill(experiment.model_copy(update=alone))


def _changed_sends(moe: MoE | None) -> dict[str, object]:
    """The defaults of what is set about sends."""
    defaults = {name: MoE.model_fields[name].default for name in _ABOUT_SENDS}
    return {name: value for name, value in defaults.items() if moe and getattr(moe, name) != value}
