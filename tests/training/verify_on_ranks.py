"""The two parts of `verify` for the ranks of tests/distributed.py, and faults to plant into the first one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.data.pretraining import Datasets
from megatron_moe.data.samples import Samples
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.plan import plan
from megatron_moe.training import verify
from megatron_moe.training.build import start
from megatron_moe.training.trainer import Trainer
from megatron_moe.training.verify_report import Report

Change = Callable[[Trainer], None]
"""What a test does to a trainer before it trains."""


def layout_part(experiment: Experiment, steps: int, folder: Path, change: Change | None = None) -> None:
    """Record under the experiment's layout."""
    trainer = start(experiment, plan.make(experiment), folder)
    if change is not None:
        change(trainer)
    verify.record(trainer, steps, folder)


def reference_part(
    experiment: Experiment, steps: int, folder: Path, tolerance: float | None, change: Change | None = None
) -> Report:
    """Compare with one process."""
    trainer = start(experiment, plan.make(experiment), folder)
    if change is not None:
        change(trainer)
    return verify.compare(trainer, steps, folder, tolerance)


class _Padded:
    """Samples whose ends are no targets, a different number of tokens in each."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = dict(self.samples[index])
        mask = sample["loss_mask"].clone()
        mask[len(mask) - 1 - index % 23 :] = 0
        return {**sample, "loss_mask": mask, "padding_mask": mask == 0}


def pad(trainer: Trainer) -> None:
    """Train on samples with padding."""
    trainer.datasets = Datasets(train=_Padded(trainer.datasets.train), valid=None)


def _layer(trainer: Trainer, number: int) -> Any:
    """A layer by its number in the whole model; only for layouts without pipeline stages."""
    decoder: Any = unwrap(trainer.chunks[0]).decoder
    return decoder.layers[number]


def double_an_experts_gradient(trainer: Trainer) -> None:
    """Expert 3 of layer 2, the second one of rank 1."""
    from megatron.core.utils import get_model_config

    config = get_model_config(trainer.chunks[0])
    finalize = config.finalize_model_grads_func

    def faulty(*args: object, **kwargs: object) -> None:
        if dist.get_rank() == 1:
            _layer(trainer, 2).mlp.experts.linear_fc2.main_grad[1] *= 2
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = faulty


def keep_a_norms_gradient_apart(trainer: Trainer) -> None:
    """Megatron-Core sums a norm's gradient over the tensor-parallel ranks only where it bears this mark."""
    _layer(trainer, 1).input_layernorm.weight.sequence_parallel = False


def keep_a_routers_gradient_apart(trainer: Trainer) -> None:
    """As for the norm: each rank's router learns from its own tokens only."""
    _layer(trainer, 1).mlp.router.weight.sequence_parallel = False


@torch.no_grad()
def change_one_ranks_router(trainer: Trainer) -> None:
    """The ranks start from different routers."""
    if dist.get_rank() == 1:
        _layer(trainer, 1).mlp.router.weight[0] += 0.01


def leave_out_a_reduction(trainer: Trainer) -> None:
    """Each rank goes on with its own part of the attention's output."""
    _layer(trainer, 1).self_attention.linear_proj.explicit_expert_comm = True


def decay_one_ranks_weights_more(trainer: Trainer) -> None:
    """The gradients are right, the update is not."""
    if dist.get_rank() == 1:
        for group in trainer.optimizer.param_groups:
            group["wd_mult"] = 100.0
