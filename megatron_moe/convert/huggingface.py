"""The weights of a Hugging Face folder, under our names."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.families import FAMILIES
from megatron_moe.convert.family import Family
from megatron_moe.convert.fp8 import Dequantized
from megatron_moe.convert.safetensors_files import SafetensorsFolder
from megatron_moe.convert.weights import Weight

CONFIG = "config.json"
_MOST_MISSING = 1_000_000
"""Tensors, of which all are named that a folder lacks."""
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class HuggingFaceWeights:
    """The weights in `folder`, as the model of `experiment` has them.

    Raises InputError naming every tensor that is missing there, that the model has no place for, or whose
    shape cannot be right. What is in FP8 is read as float32. `convert.completeness` holds the shapes against
    those of the model.
    """

    def __init__(self, folder: Path, family: Family, experiment: Experiment) -> None:
        self._of = folder, family.name, experiment
        self._files = Dequantized(SafetensorsFolder(folder), json.loads((folder / CONFIG).read_bytes()))
        stored = self._files.inventory()
        groups = _no_more(family.groups(experiment), folder, len(stored))
        self._group = {name: group for group in groups for name in group.ours}
        self._check_names(family, {name for group in groups for name in group.theirs}, stored)
        self._inventory: dict[str, Weight] = {}
        problems = [problem for group in groups for problem in self._take_in(group, stored)]
        if problems:
            raise InputError(*problems)
        self._read_together: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """Processes that share the work open the folder anew."""
        folder, family, experiment = self._of
        return _open, (folder, family, experiment)

    def inventory(self) -> Mapping[str, Weight]:
        return self._inventory

    def read(self, name: str) -> Tensor:
        if name in self._read_together:
            return self._read_together.pop(name)
        group = self._group[name]
        converted = group.to_ours([self._files.read(theirs) for theirs in group.theirs])
        # What lies together is asked for together.
        self._read_together = dict(zip(group.ours, converted, strict=True))
        return self._read_together.pop(name)

    @property
    def in_fp8(self) -> bool:
        """Whether the files have weights in FP8."""
        return self._files.any

    def origin(self, name: str) -> str:
        """The tensors of the files that a weight is made of, with their shapes."""
        stored = self._files.inventory()
        return ", ".join(f"{theirs} {list(stored[theirs].shape)}" for theirs in self._group[name].theirs)

    def _check_names(self, family: Family, wanted: set[str], stored: Mapping[str, Weight]) -> None:
        folder, _, experiment = self._of
        missing = sorted(wanted - stored.keys())
        unexpected = sorted(
            name
            for name in stored.keys() - wanted
            if not any(re.fullmatch(pattern, name) for pattern in family.without_weights)
        )
        tied = not experiment.model.untie_embeddings_and_output_weights
        if tied and _OUTPUT in unexpected and self._is_copy(_OUTPUT, _EMBEDDING, stored):
            unexpected.remove(_OUTPUT)
        problems = []
        if missing:
            problems.append(f"{folder}: lacks {len(missing)} tensors of this model: {', '.join(missing)}")
        if unexpected:
            problems.append(
                f"{folder}: holds {len(unexpected)} tensors that a {family.name} model of its config.json "
                f"has no place for: {', '.join(unexpected)}"
            )
        if problems:
            raise InputError(*problems)

    def _is_copy(self, name: str, original: str, stored: Mapping[str, Weight]) -> bool:
        """Whether a tensor that a tied model need not have is the one that it is tied to."""
        same = stored.get(original) == stored[name]
        return same and torch.equal(self._files.read(name), self._files.read(original))

    def _take_in(self, group: Group, stored: Mapping[str, Weight]) -> Iterator[str]:
        """Note what a group makes of the files' tensors, or say that it can make nothing of them."""
        given = [stored[name] for name in group.theirs]
        for name, weight in zip(group.theirs, given, strict=True):
            if not weight.dtype.is_floating_point:
                dtype = str(weight.dtype).removeprefix("torch.")
                yield f"{self._of[0]}: {name} is {dtype}, no float; get the model without quantization"
        try:
            made = converted(group.to_ours, given)
        except (RuntimeError, IndexError, ValueError):
            shapes = ", ".join(
                f"{name} {list(weight.shape)}" for name, weight in zip(group.theirs, given, strict=True)
            )
            yield f"{self._of[0]}: shapes that do not fit together or the config.json: {shapes}"
        else:
            self._inventory |= zip(group.ours, made, strict=True)


def _no_more(groups: Iterator[Group], folder: Path, stored: int) -> list[Group]:
    """The groups, unless there are so many that a config.json of a few bytes would fill the memory."""
    found = list(itertools.islice(groups, stored + _MOST_MISSING + 1))
    if len(found) > stored + _MOST_MISSING:
        raise InputError(
            f"{folder}: its files hold {stored:,} tensors, and {CONFIG} describes more than {len(found):,}"
        )
    return found


def converted(function: object, weights: Sequence[Weight]) -> list[Weight]:
    """Shapes and dtypes of what a function of a Group makes of such tensors."""
    assert callable(function)
    tensors = [torch.empty(weight.shape, dtype=weight.dtype, device="meta") for weight in weights]
    return [Weight(tuple(tensor.shape), tensor.dtype) for tensor in function(tensors)]


def _open(folder: Path, family: str, experiment: Experiment) -> HuggingFaceWeights:
    return HuggingFaceWeights(folder, FAMILIES[family], experiment)
