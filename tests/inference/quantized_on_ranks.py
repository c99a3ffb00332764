"""Run on a rank: a model in FP8."""

from __future__ import annotations

import generation_on_ranks
import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.inference.precision import LogitError, logit_error, logits_of
from megatron_moe.inference.quantized import quantize
from megatron_moe.inference.settings import Settings


def logits_and_tokens(
    experiment: Experiment,
    weights: dict[str, Tensor],
    layout: list[str],
    prompts: list[list[int]],
    block: list[int] | None,
) -> tuple[list[Tensor], LogitError, list[list[int]]]:
    """Of the model whose matrices are in FP8, and how far that is from its own."""
    generator = generation_on_ranks.generator(experiment, weights, layout)
    exact = logits_of(generator.network, prompts)
    quantize(generator.network, block)
    found = logits_of(generator.network, prompts)
    tokens = [result.tokens for result in generator.generate(prompts, Settings(max_new_tokens=8))]
    return found, logit_error(exact, found), tokens


def bytes_of_matrices(experiment: Experiment, weights: dict[str, Tensor]) -> tuple[int, int]:
    """Memory of all weights but embeddings and output layer, before and after."""
    network = generation_on_ranks.generator(experiment, weights, []).network
    before = _bytes(network.model.decoder)
    quantize(network, None)
    return before, _bytes(network.model.decoder)


def _bytes(module: torch.nn.Module) -> int:
    tensors = {x.data_ptr(): x for x in [*module.parameters(), *module.buffers()] if x.numel()}
    return sum(x.nbytes for x in tensors.values())
