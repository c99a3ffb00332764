"""`megatron-moe export`: any checkpoint becomes a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import disagreements
from megatron_moe.convert.completeness import faults
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.families import FAMILIES
from megatron_moe.convert.family import Family, NotOfFamily
from megatron_moe.convert.fp8 import CONFIG_KEY, Quantized
from megatron_moe.convert.huggingface import CONFIG, converted
from megatron_moe.convert.importing import DTYPES
from megatron_moe.convert.merging import Cast
from megatron_moe.convert.models import Model, open_model
from megatron_moe.convert.output import copy_companions, default_workers, made_aside
from megatron_moe.convert.safetensors_writer import TensorGroups, write_safetensors
from megatron_moe.convert.weights import Weight, Weights

FP8 = "fp8"
"""Linear layers and experts in FP8 with a scale for each block, all else in bf16."""
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
"""What of the config.json that came with a model stays where the model has become one of another family."""


def export_model(
    source: Path,
    out: Path,
    dtype: str | None,
    family_name: str | None,
    shard_bytes: int,
    workers: int | None,
) -> None:
    """Convert the model at `source` to the Hugging Face folder `out`, and say what was done.

    Args:
        dtype: of the weights, a key of DTYPES, or FP8. None: as they are.
        family_name: None: the one that it came in, or the first that has a word for all that it computes.
        shard_bytes: most bytes of a file.

    Raises InputError.
    """
    began = time.monotonic()
    model = open_model(source)
    family, config = _description(model, family_name)
    to_fp8 = dtype == FP8
    weights = model.weights if dtype is None else Cast(model.weights, DTYPES["bf16" if to_fp8 else dtype])
    exact = Theirs(family, model.experiment, weights)
    if problems := list(exact.faults()):
        raise InputError(*(f"{source}: {problem}" for problem in problems))
    config |= _precision(exact)
    tensors: TensorGroups = exact
    if to_fp8:
        tensors = Quantized(exact)
        config[CONFIG_KEY] = tensors.config()
    size = sum(weight.bytes for group in tensors.groups() for weight in group.values())
    with made_aside(out, size) as aside:
        if model.huggingface is not None:
            copy_companions(model.huggingface, aside)
        elif model.tokenizer is not None and model.tokenizer.model is not None:
            _copy_tokenizer(Path(model.tokenizer.model), aside)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(aside, tensors, shard_bytes, workers or default_workers(size))
    seconds = time.monotonic() - began
    count = sum(map(len, tensors.groups()))
    print(f"{out}: {family.name}, {count:,} tensors, {size / 1e9:,.2f} GB in {seconds:,.1f} s")
    if model.tokenizer is None:
        print("It has no tokenizer: put the one of the model beside it.")


class Theirs:
    """A model's weights under a family's names, group by group."""

    def __init__(self, family: Family, experiment: Experiment, weights: Weights) -> None:
        self._of = family.name, experiment, weights
        self._weights = weights
        self._groups: Sequence[Group] = list(family.groups(experiment))
        self._made: list[Mapping[str, Weight]] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Processes that share the work make the groups anew: functions cannot be sent."""
        return _theirs, self._of

    def faults(self) -> Iterator[str]:
        """Weights that the checkpoint lacks, or that the family has no place for."""
        found = self._weights.inventory()
        wanted = {name for group in self._groups for name in group.ours}
        shapes = {name: found[name].shape if name in found else () for name in wanted}
        return faults(shapes, self._weights)

    def groups(self) -> Sequence[Mapping[str, Weight]]:
        if self._made is None:
            there = self._weights.inventory()
            self._made = [
                dict(
                    zip(
                        group.theirs,
                        converted(group.to_theirs, [there[name] for name in group.ours]),
                        strict=True,
                    )
                )
                for group in self._groups
            ]
        return self._made

    def make(self, number: int) -> Iterator[tuple[str, Tensor]]:
        group = self._groups[number]
        tensors = group.to_theirs([self._weights.read(name) for name in group.ours])
        return zip(group.theirs, tensors, strict=True)


def _theirs(family: str, experiment: Experiment, weights: Weights) -> Theirs:
    return Theirs(FAMILIES[family], experiment, weights)


def _description(model: Model, family_name: str | None) -> tuple[Family, dict[str, Any]]:
    """The family that the model is written as, and its config.json without the precision."""
    original: dict[str, Any] = {}
    if model.huggingface is not None:
        original = json.loads((model.huggingface / CONFIG).read_bytes())
        original.pop(CONFIG_KEY, None)
    given = FAMILIES[family_name] if family_name is not None else model.family
    if given is not None and given is model.family and _says_the_same(given, original, model.experiment):
        return given, original
    kept = {key: original[key] for key in _KEPT if key in original}
    refusals = []
    for family in [given] if family_name is not None and given is not None else _in_turn(given):
        try:
            config = family.config(model.experiment)
        except NotOfFamily as error:
            refusals.append(f"{family.name}: {'; '.join(str(error).splitlines())}")
        else:
            return family, {"architectures": [family.architectures[0]], **config, **kept}
    raise InputError(
        f"{model.folder}: no family of Hugging Face has words for this model. What each would read instead:",
        *refusals,
    )


def _in_turn(first: Family | None) -> list[Family]:
    others = [family for family in FAMILIES.values() if family is not first]
    return others if first is None else [first, *others]


def _says_the_same(family: Family, config: dict[str, Any], experiment: Experiment) -> bool:
    """Whether a config.json describes this model still."""
    try:
        return not list(disagreements(experiment, family.sections(config)))
    except NotOfFamily:
        return False


def _precision(tensors: Theirs) -> dict[str, str]:
    """What config.json says of the precision that most of the numbers have, in the words of the library
    before and after its version 5."""
    sizes: dict[torch.dtype, int] = {}
    for group in tensors.groups():
        for weight in group.values():
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.bytes
    name = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


def _copy_tokenizer(file: Path, into: Path) -> None:
    """The file of an experiment's tokenizer under the name that the library looks for."""
    if file.is_dir() or file.name == "tokenizer.json":
        folder = file if file.is_dir() else file.parent
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, into / name)
    elif file.suffix == ".model":
        shutil.copyfile(file, into / "tokenizer.model")
