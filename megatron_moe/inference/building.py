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
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan

_TIMEOUT_S = 600


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
    fill([chunk], _WithoutFurtherPredictions(weights))
    replicas = parallel_state.get_data_parallel_group()
    return Generator(Network(chunk, experiment, dtype), replicas if replicas.size() > 1 else None)


class _WithoutFurtherPredictions:
    """The weights of a model without its layers for multi-token prediction, which generation has no use
    for."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def inventory(self) -> Mapping[str, Weight]:
        found = self.weights.inventory()
        return {name: weight for name, weight in found.items() if not name.startswith("mtp.")}

    def read(self, name: str) -> Tensor:
        return self.weights.read(name)
