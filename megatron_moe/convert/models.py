"""A model by a path, whatever lies there: a Hugging Face folder, an imported one, a checkpoint, a run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_moe.config.defaults import attempt
from megatron_moe.config.errors import InputError
from megatron_moe.config.keys import leaves
from megatron_moe.config.loading import load
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import Experiment, Tokenizer
from megatron_moe.convert.adapters import merged
from megatron_moe.convert.families import FAMILIES
from megatron_moe.convert.family import Family, Json, NotOfFamily
from megatron_moe.convert.huggingface import CONFIG, HuggingFaceWeights
from megatron_moe.convert.weights import Weights
from megatron_moe.engine import checkpoint_folders
from megatron_moe.engine.weight_files import CheckpointWeights

HUGGINGFACE = "huggingface"
"""Folder beside or above a checkpoint with the files that came with its model: config.json, tokenizer."""
RESOLVED = "resolved.yaml"


@dataclass(frozen=True)
class Model:
    """What a path stands for.

    Attributes:
        experiment: filled; its sections `model` and `moe` are the model's.
        weights: all of them, adapters added to what they stand beside.
        folder: where they lie.
        huggingface: folder with the config.json and the tokenizer that came with the model; None where it was
            trained from the beginning.
        tokenizer: None where the folders tell of none.
        family: None where no config.json came with the model.
    """

    experiment: Experiment
    weights: Weights
    folder: Path
    huggingface: Path | None
    tokenizer: Tokenizer | None
    family: Family | None


def open_model(path: str | Path) -> Model:
    """Open what lies at `path`. Raises InputError where that is no model, or one with something missing."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    if (folder / checkpoint_folders.MANIFEST).is_file():
        return _checkpoint(folder)
    if (folder / "checkpoints").is_dir():
        checkpoints = checkpoint_folders.all_of(folder)
        if not checkpoints:
            raise InputError(f"{folder}: this run has no complete checkpoint")
        # Of a damaged newest one nobody would be told who was given the one before.
        return _checkpoint(checkpoints[-1])
    if (folder / CONFIG).is_file():
        return _huggingface(folder)
    raise InputError(
        f"{folder}: is no model: neither a Hugging Face folder (it has no {CONFIG}), nor a checkpoint (no "
        f"{checkpoint_folders.MANIFEST}), nor a run (no checkpoints)"
    )


def open_folder(path: str | Path) -> Path:
    """A Hugging Face folder. Raises InputError where there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    if (folder / checkpoint_folders.MANIFEST).is_file():
        raise InputError(f"{folder}: is a checkpoint of this program already, not a Hugging Face folder")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: is no Hugging Face folder: it has no {CONFIG}")
    return folder


def read_config(folder: Path) -> tuple[dict[str, Any], Family]:
    """The config.json of a Hugging Face folder, and the family that it names. Raises InputError."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is not the description of a model")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f'{path}: architectures: {names!r} is no list of names, such as ["LlamaForCausalLM"]'
        )
    for family in FAMILIES.values():
        if set(family.architectures) & set(names):
            return config, family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    given = ", ".join(names) or "none"
    raise InputError(f"{path}: architectures: {given}, which is not known here; known ones: {known}")


def sections_of(folder: Path, config: Json, family: Family) -> dict[str, Any]:
    """The sections `model` and `moe` that a config.json stands for. Raises InputError with all that this
    program cannot compute."""
    try:
        return family.sections(config)
    except NotOfFamily as error:
        raise InputError(*(f"{folder / CONFIG}: {line}" for line in str(error).splitlines())) from None


def experiment_of(folder: Path, sections: dict[str, Any]) -> Experiment:
    """An experiment with this model, complete but for data. Raises InputError where the rules refuse it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-") or "model"
    length = sections["model"].get("max_position_embeddings", 2048)
    try:
        experiment = Experiment.model_validate(
            {
                "name": name,
                **sections,
                "data": {"kind": "mock"},
                "training": {"train_iters": 1, "global_batch_size": 1, "seq_length": length},
            }
        )
    except ValidationError as error:
        places = (f"{'.'.join(map(str, e['loc']))}: {e['input']!r}: {e['msg']}" for e in error.errors())
        raise InputError(*(f"{folder / CONFIG}: makes {place}" for place in places)) from None
    filled = attempt(experiment)
    found = filled.problems + violations(filled.experiment, filled.partial)
    if found:
        values = dict(leaves(filled.experiment))
        raise InputError(*(f"{folder / CONFIG}: makes {problem.render(values, {})}" for problem in found))
    return filled.experiment


def _huggingface(folder: Path) -> Model:
    config, family = read_config(folder)
    experiment = experiment_of(folder, sections_of(folder, config, family))
    weights = HuggingFaceWeights(folder, family, experiment)
    return Model(experiment, weights, folder, folder, tokenizer_in(folder), family)


def _checkpoint(folder: Path) -> Model:
    if fault := checkpoint_folders.fault(folder):
        older = [path for path in checkpoint_folders.complete(folder.parent.parent) if path != folder]
        remedy = f"; {older[-1]} is whole" if older else ""
        raise InputError(f"{folder}: this checkpoint is damaged: {fault}{remedy}")
    if not (folder / RESOLVED).is_file():
        raise InputError(f"{folder}: lacks {RESOLVED}, which says what model this is")
    experiment = load(folder / RESOLVED).experiment
    came_with = next(
        (
            place / HUGGINGFACE
            for place in (folder, folder.resolve().parent.parent)
            if (place / HUGGINGFACE / CONFIG).is_file()
        ),
        None,
    )
    own = experiment.data.tokenizer
    tokenizer = own if own.model is not None or own.kind == "bytes" else None
    family = None
    if came_with is not None:
        family, tokenizer = read_config(came_with)[1], tokenizer or tokenizer_in(came_with)
    weights, experiment = merged(CheckpointWeights(folder), experiment)
    return Model(experiment, weights, folder, came_with, tokenizer, family)


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None where it has none that is known here."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(kind="huggingface", model=str(folder / "tokenizer.json"))
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(kind="sentencepiece", model=str(folder / "tokenizer.model"))
    return None
