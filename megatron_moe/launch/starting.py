"""The model that a run is to start from: whether it is there and is the experiment's, and what of it the run
folder keeps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.config.errors import InputError
from megatron_moe.config.keys import leaves

if TYPE_CHECKING:
    from megatron_moe.config.loading import Loaded

HUGGINGFACE = "huggingface"
"""Folder in a run folder with what came with the model beside its weights, for `export`."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def check(loaded: Loaded) -> Path | None:
    """Raise InputError where `checkpoint.initialize_from` names no model, or another one than the experiment
    describes: one line for each key that differs.

    Returns:
        The folder with the files that came with that model, if there are any.
    """
    path = loaded.experiment.checkpoint.initialize_from
    if path is None:
        return None
    from megatron_moe.convert.sources import differences, open_source

    model = open_source(path, loaded.experiment)
    problems = list(differences(loaded.experiment, model))
    if problems:
        values = dict(leaves(loaded.experiment))
        raise InputError(*(problem.render(values, loaded.provenance) for problem in problems))
    return model.huggingface


def keep(came_with: Path, run_folder: Path) -> None:
    """Copy what came with a model, config.json and tokenizer but no weights, into the run folder."""
    place, aside = run_folder / HUGGINGFACE, run_folder / f"{HUGGINGFACE}.part"
    if place.exists() or came_with.resolve() == place.resolve():
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for file in sorted(came_with.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, aside / file.name)
    os.replace(aside, place)
