"""Which weights are trained: `training.freeze` and `training.lora` leave some as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_moe.config.errors import InputError
from megatron_moe.config.freezing import GROUPS, is_adapter, is_frozen, means
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.parameters import padded_vocab_size
from megatron_moe.plan.costs.weight import Weights
from megatron_moe.plan.costs.weights import weights_of
from megatron_moe.plan.stages import moe_layers
from megatron_moe.plan.units import Kind


class Trained(NamedTuple):
    """What is trained of an experiment's weights."""

    freeze: tuple[str, ...]
    adapters_only: bool
    layers: dict[Kind, tuple[str, ...]]
    """Before the names of a piece's weights, for each layer of its kind."""

    @classmethod
    def of(cls, experiment: Experiment) -> Trained:
        training, with_experts = experiment.training, frozenset(moe_layers(experiment))
        numbers = range(experiment.model.num_layers)
        layers: dict[Kind, tuple[str, ...]] = {
            "embedding": ("",),
            "head": ("",),
            "moe": tuple(f"decoder.layers.{n}." for n in numbers if n in with_experts),
            "dense": tuple(f"decoder.layers.{n}." for n in numbers if n not in with_experts),
            "mtp": tuple(f"mtp.layers.{n}." for n in range(experiment.model.mtp_num_layers)),
        }
        return cls(tuple(training.freeze or ()), training.lora is not None, layers)

    def holds(self, kind: Kind, weight: Weights) -> bool:
        """Whether a weight of such a piece is trained. One that is frozen in some layers only counts as
        trained in all of this kind."""
        if self.adapters_only:
            return is_adapter(weight.name)
        if not self.freeze:
            return True
        return not all(is_frozen(self.freeze, before + weight.name) for before in self.layers[kind])

    def names(self, experiment: Experiment) -> Iterator[str]:
        """All weights of the model, those of a layer's experts under one name."""
        for kind, before in self.layers.items():
            if not before:
                continue
            there = weights_of(experiment, kind, padded_vocab_size(experiment))
            names = dict.fromkeys(weight.name for weight in there if weight.total)
            yield from (layer + name for layer in before for name in names)


def check(experiment: Experiment) -> None:
    """Raise InputError with a line for each entry of `training.freeze` that means no weight, where a weight
    is frozen without its bias, and where nothing is left to train."""
    if (entries := experiment.training.freeze) is None:
        return
    trained, key = Trained.of(experiment), "training.freeze"
    names = list(trained.names(experiment))
    unmatched = [entry for entry in entries if not any(means(entry, name) for name in names)]
    if unmatched:
        shown = ", ".join(dict.fromkeys(re.sub(r"(?<=layers\.)\d+", "N", name) for name in names))
        groups = ", ".join(group for group in GROUPS if any(means(group, name) for name in names))
        raise InputError(
            *(f"{key}: {entry!r} means no weight of this model" for entry in unmatched),
            f"{key}: this model has the groups {groups}; patterns go by its weights, {shown} (those of a "
            "layer's experts are frozen together, without a number)",
        )
    frozen = {name for name in names if is_frozen(entries, name)}
    if frozen == set(names):
        raise InputError(f"{key}: leaves no weight to train; take an entry out")
    apart = [
        name
        for name in sorted(frozen)
        if ".linear_" in name
        and name.endswith(".weight")
        and (bias := name.removesuffix("weight") + "bias") in names
        and bias not in frozen
    ]
    if apart:
        first = apart[0].removesuffix("weight")
        raise InputError(
            f"{key}: freezes {apart[0]} without {first}bias, whose gradient Megatron-Core leaves out then; "
            f"write {first}*"
        )
