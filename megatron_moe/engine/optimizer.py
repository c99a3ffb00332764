"""Megatron-Core's distributed optimizer, data-parallel wrapper and learning-rate schedule, made from an
experiment."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe.config.learning_rates import main_rates, own_rates
from megatron_moe.config.schema import Experiment, Parallel
from megatron_moe.engine.adam import FusedAdam
from megatron_moe.engine.groups import gloo_beside_nccl

STATE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.uint8,
}
"""Names of the optimizer's dtypes; Transformer Engine keeps FP8 states as bytes with a scale."""


def wrap_data_parallel(
    config: Any, chunks: list[torch.nn.Module], parallel: Parallel
) -> list[torch.nn.Module]:
    """Each model chunk in Megatron-Core's DistributedDataParallel, gradients sharded for the distributed
    optimizer.

    Args:
        config: this rank's TransformerConfig.
        chunks: model chunks of this rank, in token order.
        parallel: what of the replicas' communication runs beside compute, and in which precision.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # Only the interleaved schedule starts gathers itself; elsewhere each bucket starts the next one.
        align_param_gather=parallel.overlap_param_gather and len(chunks) > 1,
        check_for_nan_in_grad=False,
        average_in_collective=False,
    )
    return [
        DistributedDataParallel(config=config, ddp_config=settings, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(experiment: Experiment, chunks: list[torch.nn.Module], dtype: torch.dtype) -> Any:
    """The distributed optimizer (ZeRO-1) over wrapped chunks; norms and biases take no weight decay, and
    embedding and experts the learning rates of their own, if any."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        # Neither Transformer Engine nor apex: ours, whose state has the shape that the checkpoints expect.
        megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
    config = optimizer_config(experiment, dtype)
    optimizer = megatron_optimizer.get_megatron_optimizer(
        config,
        chunks,
        config_overrides=_parameter_groups(experiment, config),
        use_gloo_process_groups=gloo_beside_nccl(),
    )
    # Where all weights of a kind are frozen, on every rank, there is one without any, which cannot be saved.
    there = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    if len(there) < len(optimizer.chained_optimizers):
        optimizer = megatron_optimizer.ChainedOptimizer(there)
    for group in optimizer.param_groups:
        for name in ("cpu_optimizer_cls", "gpu_optimizer_cls"):
            # The optimizer on two devices leaves classes there; a checkpoint with one could not be loaded.
            group.pop(name, None)
    return optimizer


def optimizer_config(experiment: Experiment, dtype: torch.dtype) -> Any:
    """Megatron-Core's OptimizerConfig for weights of `dtype`."""
    from megatron.core.optimizer import OptimizerConfig

    settings, training = experiment.optimizer, experiment.training
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": settings.lr,
        "min_lr": settings.min_lr,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
        "clip_grad": settings.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": True,
        "overlap_param_gather": experiment.parallel.overlap_param_gather,
        "log_num_zeros_in_grad": False,
    }
    if training.fp8 is not None:
        fields["fp8_recipe"] = training.fp8_recipe
    if settings.use_precision_aware_optimizer:
        names = ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        fields |= {name: STATE_DTYPES[getattr(settings, name)] for name in names}
        fields["use_precision_aware_optimizer"] = True
    if settings.optimizer_cpu_offload:
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": settings.optimizer_offload_fraction,
        }
    config = OptimizerConfig(**fields)
    if settings.optimizer_cpu_offload:
        # The optimizer on two devices keeps master weights itself, as the precision-aware one does. Set
        # behind the config's own checks: they compare Transformer Engine's version, None without it.
        config.use_precision_aware_optimizer = True
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        config.store_param_remainders = False
    return config


def _parameter_groups(experiment: Experiment, config: Any) -> dict[Any, Any]:
    """Which weights differ from the others in decay and rates, for Megatron-Core: key -> what differs.

    Weights whose rates are the main ones stay with the others, so that a key which repeats them changes
    nothing, not even the order in which a norm is summed.
    """
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides

    which = {
        # Word embedding and output layer; not learned positions.
        "embedding": ParamKey(attr="is_embedding_or_output_parameter"),
        "experts": ParamKey(name="*.mlp.experts.*"),
    }
    groups: dict[Any, Any] = get_standard_config_overrides(config)
    for name, rates in own_rates(experiment.optimizer).items():
        if rates != main_rates(experiment.optimizer):
            # The last entry tells the groups of a checkpoint apart: 0.16 does not look at their rates.
            groups[which[name]] = {"max_lr": rates.peak, "min_lr": rates.least, "is_decoupled_lr": name}
    return groups


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
        # It refuses a warm-up over the whole decay; one step more, behind the warm-up, is at min_lr already.
        lr_decay_steps=max(settings.lr_decay_iters, settings.lr_warmup_iters + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.lr_decay_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=settings.lr_wsd_decay_iters,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def learning_rates(experiment: Experiment, scheduler: Any) -> dict[str, float]:
    """The rates of the step at which the schedule stands: `lr`, and `lr/...` of weights with their own."""
    own = {
        f"lr/{name}": scheduler.get_lr({"max_lr": rates.peak, "min_lr": rates.least})
        for name, rates in own_rates(experiment.optimizer).items()
    }
    return {"lr": scheduler.get_lr({}), **own}
