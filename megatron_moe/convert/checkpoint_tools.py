"""`megatron-moe checkpoint`: models as sets of weights, to look at, compare, and make others of."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_moe.config.errors import InputError, not_written
from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.checkpoint_output import write_checkpoint
from megatron_moe.convert.importing import DTYPES
from megatron_moe.convert.merging import Averaged, Cast, DenseOf, Renamed
from megatron_moe.convert.models import Model, open_model
from megatron_moe.convert.safetensors_files import SINGLE
from megatron_moe.convert.safetensors_writer import write_safetensors
from megatron_moe.convert.weights import Weight, Weights
from megatron_moe.plan.show.tables import console_of_tables, print_table
from megatron_moe.plan.wording import plural

_NUMBER = re.compile(r"\.\d+\.")


def average(sources: Sequence[Path], out: Path, shares: Sequence[float] | None) -> None:
    """Write the mean of several models of one shape. `shares`: how much of each; None: alike."""
    models = [open_model(source) for source in sources]
    given = [x / max(shares) for x in shares] if shares else [1.0] * len(models)
    if len(given) != len(models):
        raise InputError(f"--shares: {len(given)} numbers for {len(models)} models; give one for each")
    names = [str(source) for source in sources]
    weights = Averaged([model.weights for model in models], [x / sum(given) for x in given], names)
    _write(out, models[0], weights, made={"averaged": [model.experiment.name for model in models]})


def cast(source: Path, out: Path, dtype: str) -> None:
    """Write a model in another precision."""
    model = open_model(source)
    _write(out, model, Cast(model.weights, DTYPES[dtype]), made={"cast": dtype})


def dense(source: Path, out: Path, expert: int | None) -> None:
    """Write the dense model in which one expert, or the mean of all, stands for each mixture."""
    model = open_model(source)
    experiment = dense_experiment(source, model.experiment, expert)
    _write(
        out,
        replace(model, experiment=experiment),
        DenseOf(model.weights, expert),
        made={"dense": "mean of all experts" if expert is None else f"expert {expert}"},
    )


def dense_experiment(source: Path, mixture: Experiment, expert: int | None) -> Experiment:
    """The experiment of that dense model. Raises InputError where there is none."""
    moe, model = mixture.moe, mixture.model
    if moe is None:
        raise InputError(f"{source}: is a dense model already")
    if expert is not None and expert >= moe.num_moe_experts:
        last = moe.num_moe_experts - 1
        raise InputError(f"--expert {expert}: the model has the experts 0 to {last}")
    if moe.moe_shared_expert_intermediate_size is not None:
        raise InputError(f"{source}: has shared experts beside the routed ones: no one dense layer is both")
    width = moe.moe_ffn_hidden_size
    if not all(moe_layers(mixture)) and model.ffn_hidden_size != width:
        raise InputError(
            f"{source}: its dense layers are {model.ffn_hidden_size} wide, its experts {width}: no dense "
            "model of ours has both"
        )
    activation = moe.moe_expert_activation
    changed = model.model_copy(update={"ffn_hidden_size": width, "activation": activation})
    return mixture.model_copy(update={"model": changed, "moe": None, "name": f"{mixture.name}-dense"})


def rename(source: Path, out: Path, renames: Sequence[tuple[str, str]]) -> None:
    """Write a model with other names for its weights: those that a model of its experiment has."""
    model = open_model(source)
    _write(out, model, Renamed(model.weights, renames), made={"renamed": [list(pair) for pair in renames]})


class _Picked:
    """Some weights under our names, one at a time."""

    def __init__(self, weights: Weights, names: Sequence[str]) -> None:
        self._weights, self._names = weights, names

    def groups(self) -> Sequence[Mapping[str, Weight]]:
        there = self._weights.inventory()
        return [{name: there[name]} for name in self._names]

    def make(self, number: int) -> Iterator[tuple[str, Tensor]]:
        name = self._names[number]
        yield name, self._weights.read(name)


def extract(source: Path, out: Path, patterns: Sequence[str]) -> None:
    """Write the weights whose names a shell pattern matches to a safetensors file, as they are."""
    if out.suffix != ".safetensors" or os.path.lexists(out):
        raise InputError(f"{out}: name a file that is not there, ending in .safetensors")
    weights = open_model(source).weights
    names = [name for name in weights.inventory() if any(fnmatchcase(name, p) for p in patterns)]
    if not names:
        raise InputError(
            f"{' '.join(patterns)}: no weight has such a name; `checkpoint show {source}` lists them"
        )
    aside = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir(exist_ok=True)
        write_safetensors(aside, _Picked(weights, names), shard_bytes=sys.maxsize, workers=1)
        os.rename(aside / SINGLE, out)
    except OSError as error:
        raise not_written(f"{out}: cannot be written", error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{out}: {plural(len(names), 'weight')}, {out.stat().st_size / 1e6:,.1f} MB")


def show(source: Path) -> None:
    """Print the weights of a model, those of layers and experts that look alike in one line."""
    weights = open_model(source).weights.inventory()
    kinds: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, weight in weights.items():
        kind = (_NUMBER.sub(".*.", name), weight.shape, str(weight.dtype).removeprefix("torch."))
        kinds[kind] = kinds.get(kind, 0) + 1
    print_table(
        console_of_tables(),
        {
            "weight": [name for name, _, _ in kinds],
            "shape": [" x ".join(map(str, shape)) for _, shape, _ in kinds],
            "dtype": [dtype for _, _, dtype in kinds],
            "number": [f"{count:,}" for count in kinds.values()],
        },
        left=("weight", "dtype"),
        folded=("weight",),
    )
    parameters, size = (
        sum(math.prod(w.shape) for w in weights.values()),
        sum(w.bytes for w in weights.values()),
    )
    print(f"{plural(len(weights), 'weight')}, {parameters / 1e6:,.3f} M numbers, {size / 1e9:,.3f} GB")


def _write(out: Path, model: Model, weights: Weights, made: Mapping[str, Any]) -> None:
    began = time.monotonic()
    size = write_checkpoint(
        out, model.experiment, weights, came_with=model.huggingface, about={"made": dict(made)}
    )
    count = len(weights.inventory())
    print(f"{out}: {count:,} weights, {size / 1e9:,.2f} GB in {time.monotonic() - began:,.1f} s")
