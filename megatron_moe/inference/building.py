"""From a model on disk to a `Network` on this rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.loading import fill
from megatron_moe.convert.weights import Weight, Weights
from megatron_moe.engine import groups
from megatron_moe.engine.device import Device
from megatron_moe.inference.generation import Generator
from megatron_moe.inference.network import Network
from megatron_moe.model.gpt import build_chunks, padded_vocab_size
from megatron_moe.plan import plan

_TIMEOUT_S = 600
_BY_TOKEN = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Weights with a row a token."""


def build(experiment: Experiment, weights: Weights, device: Device, dtype: torch.dtype) -> Generator:
    """This rank's part of a model, ready to generate. A collective over all ranks of the layout.

    The process group must be there.

    Args:
        experiment: of `layout.inference_experiment`.
        weights: of the model, in any precision.
        dtype: in which it is kept and computed.

    Raises InputError where the weights are not those of the model.
    """
    from megatron.core import parallel_state

    planned = plan.make(experiment, profiled=False)
    groups.initialize_model_parallel(planned.layout, experiment.training.seed, _TIMEOUT_S)
    (chunk,) = build_chunks(experiment, planned, dtype, drawn=False)
    fill([chunk], _ForInference(weights, padded_vocab_size(experiment)))
    replicas = parallel_state.get_data_parallel_group()
    return Generator(Network(chunk, experiment, dtype), replicas if replicas.size() > 1 else None)


class _ForInference:
    """The weights of a model without its layers for multi-token prediction, which generation has no use for,
    and with rows for so many tokens as the ranks can share evenly."""

    def __init__(self, weights: Weights, rows: int) -> None:
        self.weights, self.rows = weights, rows

    def inventory(self) -> Mapping[str, Weight]:
        found = self.weights.inventory()
        return {
            name: Weight((self.rows, *weight.shape[1:]), weight.dtype) if name in _BY_TOKEN else weight
            for name, weight in found.items()
            if not name.startswith("mtp.")
        }

    def read(self, name: str) -> Tensor:
        weight = self.weights.read(name)
        if name not in _BY_TOKEN:
            return weight
        return torch.cat([weight, weight.new_zeros(self.rows - len(weight), *weight.shape[1:])])
