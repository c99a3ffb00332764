"""Whether the sinks of an experiment can be fed here; looked at before any rank starts, without torch."""

from __future__ import annotations

import importlib.util
import os

from megatron_moe.config.errors import InputError
from megatron_moe.config.keys import leaves
from megatron_moe.config.loading import Loaded
from megatron_moe.config.origin import Problem
from megatron_moe.training.callbacks.weights_and_biases import mode_of


def check(loaded: Loaded) -> None:
    """Raise InputError with a line for each package that is missing, and for a WANDB_MODE without meaning."""
    logging = loaded.experiment.logging
    problems: list[Problem] = []
    if logging.tensorboard and _missing("tensorboard"):
        problems.append(_needs("logging.tensorboard", "tensorboard", "megatron-moe[tensorboard]"))
    if logging.wandb is not None and mode_of(logging.wandb, os.environ) is not None and _missing("wandb"):
        problems.append(_needs("logging.wandb.project", "wandb", "wandb"))
    if problems:
        values = dict(leaves(loaded.experiment))
        raise InputError(*(problem.render(values, loaded.provenance) for problem in problems))


def _missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _needs(key: str, package: str, requirement: str) -> Problem:
    text = f"needs the package {package}, which is not installed here"
    return Problem((key,), text, f"pip install '{requirement}', or leave it out")
