"""The small experiment that `profile` measures in the place of one: its pieces, and nothing of its depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment, Logging
from megatron_moe.config.schema.data import Data

LAYERS_OF_A_KIND = 2
"""More would change nothing but the time it takes."""
MICROBATCHES = 4


def measured(experiment: Experiment, ranks: int, folder: Path) -> Experiment:
    """All layers in one stage, two of each kind, on random tokens.

    Args:
        experiment: filled.
        ranks: that train it; more replicas than the experiment has stand for its other pipeline stages.
        folder: takes what a run leaves behind.
    """
    parallel, recompute, training = experiment.parallel, experiment.recompute, experiment.training
    replicas = ranks // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    has_experts = [kind for kind in (False, True) for _ in range(_layers(experiment, kind))]
    modules = recompute.modules if recompute.granularity == "selective" else []
    sections: dict[str, dict[str, Any]] = {
        "model": {"num_layers": len(has_experts)},
        "parallel": {
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": 1,
            "data_parallel_size": replicas,
            "overlap_grad_reduce": False,
            "overlap_param_gather": False,
        },
        "pipeline": dict.fromkeys(type(experiment.pipeline).model_fields),
        "recompute": {
            "granularity": "selective" if modules else "none",
            "layers_per_stage": [0],
            "method": "block",
            "modules": modules,
        },
        "training": {
            "global_batch_size": replicas * MICROBATCHES * training.micro_batch_size,
            "rampup_batch_size": None,
            "eval_interval": None,
        },
        "launch": {"profile": None},
    }
    if experiment.moe is not None:
        sections["moe"] = {
            "moe_layer_freq": [int(kind) for kind in has_experts],
            "moe_first_k_dense_layers": 0,
        }
    changed: dict[str, Any] = {
        name: getattr(experiment, name).model_copy(update=update) for name, update in sections.items()
    }
    changed |= {
        "data": Data(kind="mock"),
        "logging": Logging(root=str(folder), detail_interval=training.train_iters + 1, curves=False),
    }
    return experiment.model_copy(update=changed)


def _layers(experiment: Experiment, with_experts: bool) -> int:
    return min(LAYERS_OF_A_KIND, sum(kind == with_experts for kind in moe_layers(experiment)))
