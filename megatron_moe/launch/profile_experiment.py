"""The small experiment that `profile` measures in the place of one: its pieces, and nothing of its depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment, Logging
from megatron_moe.config.schema.data import Data

LAYERS_ON_HOST, LAYERS_ON_GPU = 4, 2
"""Of each kind. On a host the layer that follows the output layer, or a wait, takes longer than the others,
likely because caches are cold: of two layers it would be too large a part. A GPU's memory must hold them, and
there it was not measured."""
MICROBATCHES = 4


def measured(experiment: Experiment, ranks: int, on_host: bool, folder: Path) -> Experiment:
    """All layers in one stage, few of each kind, on random tokens.

    Args:
        experiment: filled.
        ranks: that train it; more replicas than the experiment has stand for its other pipeline stages.
        on_host: whether they compute without GPUs.
        folder: takes what a run leaves behind.
    """
    parallel, recompute, training = experiment.parallel, experiment.recompute, experiment.training
    replicas = ranks // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    has_experts = [kind for kind in (False, True) for _ in range(_layers(experiment, kind, on_host))]
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


def _layers(experiment: Experiment, with_experts: bool, on_host: bool) -> int:
    most = LAYERS_ON_HOST if on_host else LAYERS_ON_GPU
    return min(most, sum(kind == with_experts for kind in moe_layers(experiment)))
