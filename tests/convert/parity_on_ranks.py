"""Run on a rank: a model with given weights, as the trainer builds it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_families import loss_of
from torch import Tensor
from weights_in_memory import InMemory

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.loading import fill
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import sharded_gradients
from megatron_moe.engine.weights import holds_weights, names_in
from megatron_moe.model.gpt import build_chunks
from megatron_moe.model.multi_token import Further
from megatron_moe.plan import plan as plans


def outputs(
    experiment: Experiment, weights: dict[str, Tensor], tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [b, s, v] of the whole model, and the gradients of `loss_of` by the names of its weights."""
    chunk = _model(experiment, weights)
    logits = chunk(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)
    loss_of(logits, tokens).backward()
    for weight in chunk.parameters():
        weight.main_grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return logits.detach(), by_name(sharded_gradients([chunk]))


def further_losses(experiment: Experiment, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Losses [b, s - 2] of the token after the next, as the layer for it predicts it."""
    chunk = _model(experiment, weights)
    seen, labels, further = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    marks = torch.zeros_like(seen, dtype=torch.bool)
    positions = torch.arange(seen.size(1)).expand_as(seen)
    losses = chunk(seen, positions, None, labels=labels, further=[Further(labels, further, marks)])
    return losses[1].detach()


def _model(experiment: Experiment, weights: dict[str, Tensor]) -> Any:
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, experiment.training.seed, timeout_s=60)
    (chunk,) = build_chunks(experiment, plan, torch.float32)
    fill([chunk], InMemory(weights))
    return chunk


def by_name(shards: list[Any]) -> dict[str, Tensor]:
    """The matrices of one rank that has all of them."""
    stacks: dict[str, Tensor] = {}
    for shard in shards:
        if holds_weights(shard.key):
            sizes = [1] * shard.prepend_axis_num + list(shard.local_shape)
            ends = zip(shard.global_offset, sizes, strict=True)
            where = tuple(slice(begin, begin + size) for begin, size in ends)
            stack = stacks.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))
            stack[where] = shard.data.detach().reshape(stack[where].shape)
    return {name: stack[place] for key, stack in stacks.items() for place, name in names_in(key, stack.shape)}
