"""Writes a model as a checkpoint folder, which training, export and all else that takes a model opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.completeness import faults
from megatron_moe.convert.models import HUGGINGFACE, RESOLVED
from megatron_moe.convert.output import copy_companions, default_workers, made_aside
from megatron_moe.convert.weights import Weights
from megatron_moe.engine import checkpoint_folders, weight_writer
from megatron_moe.engine.versions import installed_versions
from megatron_moe.model.skeleton import skeleton

ABOUT = "about.json"


def write_checkpoint(
    out: Path,
    experiment: Experiment,
    weights: Weights,
    *,
    came_with: Path | None = None,
    about: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    workers: int | None = None,
) -> int:
    """Write the model of a filled experiment to `out`, which must not be there. Memory: a few matrices.

    Args:
        weights: all of the model's, no more.
        came_with: folder with config.json and tokenizer, which are carried along.
        about: what else the checkpoint is to say of itself.
        texts: further files, by name.
        workers: processes. Default: by size.

    Returns:
        The bytes of the weights. Raises InputError where weights are missing, too many or of another shape,
        all of them named; RunError where the disk is full. Then nothing is left of `out`.
    """
    model = skeleton(experiment)
    if problems := list(faults(model.shapes(), weights)):
        raise InputError(*(f"{out}: {problem}" for problem in problems))
    size = sum(weight.bytes for weight in weights.inventory().values())
    with made_aside(out, size) as aside:
        hashes = weight_writer.write(
            aside, model.tensors, model.objects, weights, workers or default_workers(size)
        )
        if came_with is not None:
            copy_companions(came_with, aside / HUGGINGFACE)
        described = {
            "iteration": 0,
            "consumed_samples": 0,
            "versions": installed_versions(),
            "tokenizer_sha256": None,
            "data": None,
            **(about or {}),
        }
        for name, text in {
            ABOUT: json.dumps(described, indent=2) + "\n",
            RESOLVED: to_yaml(experiment),
            **(texts or {}),
        }.items():
            (aside / name).write_text(text, encoding="utf-8")
        files = {str(path.relative_to(aside)): path for path in aside.rglob("*") if path.is_file()}
        hashes |= {name: checkpoint_folders.sha256(files[name]) for name in files.keys() - hashes.keys()}
        checkpoint_folders.seal(aside, 0, hashes)
    return size
