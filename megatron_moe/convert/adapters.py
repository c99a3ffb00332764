"""A model with low-rank adapters as the one model that both compute together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_moe.config.freezing import is_adapter
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.weights import Weight, Weights


class MergedLora:
    """W + scale * B A in the place of each matrix that has an adapter, computed in float32 and rounded once;
    all other weights as they are.

    Args:
        weights: with `.. .lora_a` [rank, in] and `.. .lora_b` [out, rank] beside `.. .weight` [out, in].
        scale: alpha / rank.
    """

    def __init__(self, weights: Weights, scale: float) -> None:
        self._weights, self._scale = weights, scale

    def inventory(self) -> Mapping[str, Weight]:
        there = self._weights.inventory()
        return {name: weight for name, weight in there.items() if not is_adapter(name)}

    def read(self, name: str) -> Tensor:
        weight = self._weights.read(name)
        at, _, last = name.rpartition(".")
        if last != "weight" or f"{at}.lora_a" not in self._weights.inventory():
            return weight
        a, b = (self._weights.read(f"{at}.lora_{half}").float() for half in "ab")
        return weight.float().addmm_(b, a, alpha=self._scale).to(weight.dtype)


def merged(weights: Weights, experiment: Experiment) -> tuple[Weights, Experiment]:
    """The model without adapters, and an experiment that has none; both as they are where there are none."""
    training = experiment.training
    if training.lora is None:
        return weights, experiment
    assert training.lora.alpha is not None
    without = experiment.model_copy(update={"training": training.model_copy(update={"lora": None})})
    return MergedLora(weights, training.lora.alpha / training.lora.rank), without
