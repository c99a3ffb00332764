"""What the benchmark measures against: Megatron-Core by itself, without Transformer Engine and apex.

Its local layer spec (SequentialMLP, DotProductAttention, torch's norm, its router), its data-parallel wrapper
and distributed optimizer over torch.optim.AdamW, and a bare loop around its schedule: no metrics, no log.
It is lent what it lacks: the host's stand-ins for torch.cuda, and our norm under sequence parallelism, which
its own refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import distrib_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.engine.optimizer import build_scheduler
from megatron_moe.model.gpt import padded_vocab_size
from megatron_moe.model.norms import Norm
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.training.forward import Batch
from megatron_moe.training.trainer import Trainer


class Loop:
    """The bare loop: one global batch through Megatron-Core's schedule, then its optimizer's step.

    Args:
        model: wrapped for data parallelism; its TransformerConfig has the schedule's hooks.
        trainer: says how many microbatches of what shape a step has.
        attention_mask: [1, 1, s, s], true where a query must not look; None: the model knows.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        trainer: Trainer,
        attention_mask: Tensor | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.shapes = trainer.shapes()
        self.forward_step = partial(_forward_step, attention_mask)

    def step(self, batches: list[Batch]) -> list[Tensor]:
        """Train on this rank's microbatches of a step; returns each one's [loss sum, targets]."""
        self.model.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        self.scheduler.step(1)
        reports: list[Tensor] = get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=self.shapes.num_microbatches,
            seq_length=self.shapes.seq_length,
            micro_batch_size=self.shapes.micro_batch_size,
            forward_only=False,
        )
        self.optimizer.step()
        return reports


def _forward_step(
    attention_mask: Tensor | None, batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    """Megatron-Core's contract: one microbatch's token losses, and the function that sums them."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], attention_mask, labels=batch["labels"])
    return losses, partial(_loss, batch["loss_mask"])


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, targets = (losses * loss_mask).sum(), loss_mask.sum()
    return total, targets.to(torch.int), torch.stack([total.detach(), targets])


def plain_loop(trainer: Trainer) -> Loop:
    """Megatron-Core's own model with the weights of `trainer`'s, and everything needed to train it."""
    experiment, ours = trainer.experiment, trainer.chunks[0]
    config = transformer_config(experiment, trainer.plan, 0, next(ours.parameters()).dtype)
    _use_its_router(config, experiment)
    model = GPTModel(
        config=config,
        transformer_layer_spec=_layer_specs(config),
        vocab_size=padded_vocab_size(experiment),
        max_sequence_length=experiment.model.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=not experiment.model.untie_embeddings_and_output_weights,
        position_embedding_type=experiment.model.position_embedding_type,
        rotary_percent=experiment.model.rotary_percent,
        rotary_base=int(experiment.model.rotary_base),
    )
    _copy_weights(dict(unwrap(ours).named_parameters()), model)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(config, settings, model)
    optimizer = _optimizer(trainer, wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    s = experiment.training.seq_length
    # Left out, DotProductAttention would make one for each layer and microbatch, on a GPU by name.
    mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1).to(trainer.device.torch_device)
    return Loop(wrapped, optimizer, build_scheduler(experiment, optimizer), trainer, mask)


def _use_its_router(config: Any, experiment: Experiment) -> None:
    """Our config leaves routing to our router."""
    moe = experiment.moe
    if moe is None:
        return
    config.moe_router_load_balancing_type = moe.moe_router_load_balancing_type
    config.moe_aux_loss_coeff, config.moe_z_loss_coeff = moe.moe_aux_loss_coeff, moe.moe_z_loss_coeff or None
    config.moe_router_pre_softmax = moe.moe_router_pre_softmax
    config.moe_expert_capacity_factor = None


def _layer_specs(config: Any) -> Any:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
    )
    norm = layer.submodules.input_layernorm
    if config.sequence_parallel:
        norm = layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=norm)


@torch.no_grad()
def _copy_weights(ours: dict[str, torch.nn.Parameter], model: torch.nn.Module) -> None:
    """SequentialMLP has a module for each expert, ours one weight for all; the other names are the same."""
    for name, parameter in model.named_parameters():
        expert = re.fullmatch(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc\d)\.weight", name)
        parameter.copy_(ours[f"{expert[1]}.{expert[3]}"][int(expert[2])] if expert else ours[name])


def _optimizer(trainer: Trainer, model: torch.nn.Module) -> Any:
    """With torch.optim.AdamW, Megatron-Core's own choice; the package has put its own Adam in the place."""
    adam = torch.optim.AdamW
    with (
        mock.patch.multiple(megatron_optimizer, USING_PYTORCH_OPTIMIZER=True, Adam=adam),
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=False, Adam=adam),
    ):
        config = trainer.optimizer.chained_optimizers[0].config
        return megatron_optimizer.get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
