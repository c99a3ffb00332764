"""Megatron-Core's distributed optimizer, data-parallel wrapper and learning-rate schedule, made from an
experiment."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.adam import FusedAdam
from megatron_moe.engine.groups import gloo_beside_nccl


def wrap_data_parallel(config: Any, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Each model chunk in Megatron-Core's DistributedDataParallel, gradients sharded for the distributed
    optimizer.

    Args:
        config: this rank's TransformerConfig.
        chunks: model chunks of this rank, in token order.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        check_for_nan_in_grad=False,
        average_in_collective=False,
    )
    return [
        DistributedDataParallel(config=config, ddp_config=settings, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(experiment: Experiment, chunks: list[torch.nn.Module], dtype: torch.dtype) -> Any:
    """The distributed optimizer (ZeRO-1) over wrapped chunks; norms and biases take no weight decay."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        # Neither Transformer Engine nor apex: ours, whose state has the shape that the checkpoints expect.
        megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
    settings = experiment.optimizer
    config = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        log_num_zeros_in_grad=False,
    )
    return megatron_optimizer.get_megatron_optimizer(
        config, chunks, use_gloo_process_groups=gloo_beside_nccl()
    )


def build_scheduler(experiment: Experiment, optimizer: Any) -> Any:
    """Megatron-Core's schedule of learning rate and weight decay, counted in iterations."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = experiment.optimizer
    assert settings.lr_warmup_iters is not None and settings.lr_decay_iters is not None
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=settings.lr_decay_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.lr_decay_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
