"""Run on a rank: a model with given weights, as it generates."""

from __future__ import annotations

from typing import Any

import torch
from parity_on_ranks import by_name
from torch import Tensor
from weights_in_memory import InMemory

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import device as devices
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import sharded_weights
from megatron_moe.inference.building import build
from megatron_moe.inference.cache import Cache
from megatron_moe.inference.generation import Generator, Likelihood
from megatron_moe.inference.layout import inference_experiment
from megatron_moe.inference.settings import Settings
from megatron_moe.inference.step import Step
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan as plans

Prompts = list[list[int]]


def generated(
    experiment: Experiment,
    weights: dict[str, Tensor],
    layout: list[str],
    prompts: Prompts,
    settings: list[Settings],
) -> list[list[list[int]]]:
    """What each of the settings makes of the prompts."""
    made = generator(experiment, weights, layout)
    return [[result.tokens for result in made.generate(prompts, each)] for each in settings]


def each_alone(
    experiment: Experiment, weights: dict[str, Tensor], prompts: Prompts, settings: Settings
) -> list[list[int]]:
    """As `generated`, prompt by prompt."""
    made = generator(experiment, weights, [])
    return [made.generate([prompt], settings)[0].tokens for prompt in prompts]


def likelihoods(
    experiment: Experiment, weights: dict[str, Tensor], layout: list[str], prompts: Prompts, starts: list[int]
) -> list[Likelihood]:
    return generator(experiment, weights, layout).log_likelihoods(prompts, starts, tokens_at_once=16)


def drawn(experiment: Experiment) -> dict[str, Tensor]:
    """First weights of the whole model, by name; biases, sinks and norms are none that change nothing."""
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, experiment.training.seed, timeout_s=60)
    chunks = build_chunks(experiment, plan, torch.float32)
    random = torch.Generator().manual_seed(3)
    for weight in chunks[0].parameters():
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn(weight.shape, generator=random)
    return by_name(sharded_weights(chunks))


def heads_of_this_rank(experiment: Experiment, weights: dict[str, Tensor], layout: list[str]) -> Any:
    """Query heads, rows of the projection of queries, keys and values, columns of the output's, and heads in
    the cache."""
    made = generator(experiment, weights, layout)
    caches: list[Cache] = []
    attend = made.network.attentions[0]

    def watching(hidden: Tensor, step: Step, cache: Cache, angles: Any) -> Any:
        caches.append(cache)
        return attend(hidden, step, cache, angles)

    made.network.attentions[0] = watching  # type: ignore[call-overload]
    made.generate([[1, 2, 3]], Settings(max_new_tokens=1))
    attention = made.network.layers[0].self_attention
    return (
        attention.num_attention_heads_per_partition,
        len(attention.linear_qkv.weight),
        attention.linear_proj.weight.size(1),
        caches[0].kept[0][0].size(2),
    )


def generator(experiment: Experiment, weights: dict[str, Tensor], layout: list[str]) -> Generator:
    device = devices.start(0)
    return build(inference_experiment(experiment, layout), InMemory(weights), device, torch.float32)
