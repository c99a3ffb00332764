"""Weights made of other weights: averaged, in another precision, under other names, one expert taken out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.convert.weights import Weight, Weights

_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(.*)")
_ROUTER = re.compile(r".*\.mlp\.router\..*")
_SHOWN = 6


class Averaged:
    """The mean of several models of one shape, computed in float32, in the precision of the first."""

    def __init__(self, models: Sequence[Weights], shares: Sequence[float], names: Sequence[str]) -> None:
        """`shares`: how much of each, adding up to 1. `names`: of the models, for what is said. InputError
        where they hold other weights than the first."""
        first = models[0].inventory()
        problems = [
            f"{name}: cannot be averaged with {names[0]}: {difference}"
            for model, name in zip(models[1:], names[1:], strict=True)
            if (difference := _other_weights(first, model.inventory()))
        ]
        if problems:
            raise InputError(*problems)
        self._models, self._shares = list(zip(models, shares, strict=True)), shares

    def inventory(self) -> Mapping[str, Weight]:
        return self._models[0][0].inventory()

    def read(self, name: str) -> Tensor:
        weight = self.inventory()[name]
        mean = torch.zeros(weight.shape)
        for model, share in self._models:
            mean += share * model.read(name).float()
        return mean.to(weight.dtype)


class Cast:
    """Everything in another precision, but for the biases that balance experts: these are always float32."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def inventory(self) -> Mapping[str, Weight]:
        return {
            name: weight._replace(dtype=self._of(name, weight))
            for name, weight in self._weights.inventory().items()
        }

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        cast = tensor.to(self._of(name, Weight(tuple(tensor.shape), tensor.dtype)))
        if cast.dtype is torch.float16 and cast.isinf().any() and not tensor.isinf().any():
            raise InputError(f"{name}: has numbers beyond 65504, the largest of fp16; use bf16 or fp32")
        return cast

    def _of(self, name: str, weight: Weight) -> torch.dtype:
        return weight.dtype if name.endswith("expert_bias") else self._dtype


class Renamed:
    """The same weights under other names."""

    def __init__(self, weights: Weights, renames: Sequence[tuple[str, str]]) -> None:
        """`renames`: expressions and what takes their place, as `re.sub` has it, one behind the other.
        InputError for one that matches nothing, and where two weights would have one name."""
        self._weights = weights
        self._old: dict[str, str] = {}
        used: set[str] = set()
        for old in weights.inventory():
            new = old
            for pattern, replacement in renames:
                try:
                    new, count = re.subn(pattern, replacement, new)
                except (re.error, IndexError) as error:
                    raise InputError(f"{pattern}={replacement}: {error}") from None
                used |= {pattern} if count else set()
            if new in self._old:
                raise InputError(f"{old} and {self._old[new]} would both be called {new}")
            self._old[new] = old
        if unused := [pattern for pattern, _ in renames if pattern not in used]:
            raise InputError(
                *(f"{pattern}: matches no weight; `checkpoint show` lists them" for pattern in unused)
            )

    def inventory(self) -> Mapping[str, Weight]:
        there = self._weights.inventory()
        return {new: there[old] for new, old in self._old.items()}

    def read(self, name: str) -> Tensor:
        return self._weights.read(self._old[name])


class DenseOf:
    """The dense model in whose feed-forward layers one expert stands, or the mean of all of them."""

    def __init__(self, mixture: Weights, expert: int | None) -> None:
        """`expert`: its number in each layer; None: the mean of all."""
        self._mixture, self._expert = mixture, expert

    def inventory(self) -> Mapping[str, Weight]:
        return self._inventory

    def read(self, name: str) -> Tensor:
        sources = self._sources[name]
        if len(sources) == 1:
            return self._mixture.read(sources[0])
        total = torch.zeros(self._inventory[name].shape)
        for source in sources:
            total += self._mixture.read(source).float()
        return (total / len(sources)).to(self._inventory[name].dtype)

    @cached_property
    def _sources(self) -> dict[str, list[str]]:
        """Of which weights of the mixture each of the dense model's is the mean."""
        sources: dict[str, list[str]] = {}
        for name in self._mixture.inventory():
            match = _EXPERT.fullmatch(name)
            if match is not None:
                if self._expert in (None, int(match[2])):
                    sources.setdefault(f"{match[1]}.{match[3]}", []).append(name)
            elif not _ROUTER.fullmatch(name):
                sources[name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")] = [name]
        return sources

    @cached_property
    def _inventory(self) -> dict[str, Weight]:
        there = self._mixture.inventory()
        return {name: there[sources[0]] for name, sources in self._sources.items()}


def _other_weights(first: Mapping[str, Weight], other: Mapping[str, Weight]) -> str:
    """What `other` lacks, has too many, or has in another shape; empty where nothing is."""
    parts = []
    for what, names in (
        ("lacks", [*first.keys() - other.keys()]),
        ("has besides", [*other.keys() - first.keys()]),
        ("other shapes of", [n for n in first.keys() & other.keys() if first[n].shape != other[n].shape]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{what} {', '.join(sorted(names)[:_SHOWN])}{more}")
    return "; ".join(parts)
