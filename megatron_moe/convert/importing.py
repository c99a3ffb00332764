"""`megatron-moe import`: a Hugging Face folder becomes a checkpoint that any layout loads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.dump import flow
from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import disagreements
from megatron_moe.convert.checkpoint_output import write_checkpoint
from megatron_moe.convert.family import Family, Json, NotOfFamily
from megatron_moe.convert.huggingface import CONFIG, HuggingFaceWeights
from megatron_moe.convert.merging import Cast
from megatron_moe.convert.models import experiment_of, open_folder, read_config, sections_of
from megatron_moe.convert.starter import starter_yaml
from megatron_moe.convert.weights import Weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STARTER = "experiment.yaml"


def import_model(
    source: Path, out: Path, dtype: str | None, config_path: Path | None, workers: int | None
) -> None:
    """Convert the Hugging Face folder `source` to the checkpoint folder `out`, and say what was done.

    Args:
        dtype: of the weights, a key of DTYPES. None: as they are, from FP8 bf16.
        config_path: an experiment whose model must be that of the folder. None: one is made of config.json.

    Raises InputError.
    """
    began = time.monotonic()
    folder = open_folder(source)
    config, family = read_config(folder)
    sections = sections_of(folder, config, family)
    if config_path is None:
        experiment = experiment_of(folder, sections)
        origin = f"The model of {source.resolve().name}, as its config.json says"
        texts = {STARTER: starter_yaml(source, experiment, sections, origin)}
    else:
        experiment = load(config_path).experiment
        problems = list(_disagreements(config_path, experiment, folder, config, family, sections))
        if problems:
            raise InputError(*problems)
        texts = {}
    files = HuggingFaceWeights(folder, family, experiment)
    weights: Weights = files
    if dtype is not None or files.in_fp8:
        # FP8 is undone to what the model was trained in.
        weights = Cast(weights, DTYPES[dtype or "bf16"])
    about = {"imported": {"family": family.name, "architectures": config.get("architectures")}}
    size = write_checkpoint(
        out, experiment, weights, came_with=folder, about=about, texts=texts, workers=workers
    )
    seconds = time.monotonic() - began
    count = len(weights.inventory())
    print(f"{out}: {family.name}, {count:,} weights, {size / 1e9:,.2f} GB in {seconds:,.1f} s")
    if texts:
        print(
            f"To finetune it, say on what in {out / STARTER}, and start: megatron-moe train {out / STARTER}"
        )


def _disagreements(
    config_path: Path,
    experiment: Experiment,
    folder: Path,
    config: Json,
    family: Family,
    sections: dict[str, Any],
) -> Iterator[str]:
    """A line for each key of the experiment that makes it another model, with the one of config.json that
    it follows from."""
    for key, value, other in disagreements(experiment, sections):
        theirs = ", ".join(f"{name}: {config[name]!r}" for name in _decided_by(key, config, family, sections))
        source = f"({theirs})" if theirs else "(nothing there says otherwise)"
        yield f"{config_path}: {key}: {flow(value)}, but {folder / CONFIG} makes it {flow(other)} {source}"


def _decided_by(key: str, config: Json, family: Family, sections: dict[str, Any]) -> list[str]:
    """Keys of config.json without which, or with another value, ours would be another."""

    def value_of(sections: dict[str, Any]) -> Any:
        holder: Any = sections
        for part in key.split("."):
            holder = (holder or {}).get(part)
        return holder

    found = []
    for name, value in config.items():
        changes: list[Any] = [None]
        if isinstance(value, bool):
            changes.append(not value)
        elif isinstance(value, int | float):
            changes.append(value + 1)
        for change in changes:
            try:
                other = family.sections({**config, name: change})
            except NotOfFamily:
                continue
            if value_of(other) != value_of(sections):
                found.append(name)
                break
    return found
