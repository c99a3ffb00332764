"""The experiment of a mixture that is made of a dense model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.loading import load
from megatron_moe.config.one_process import in_one_process
from megatron_moe.config.schema import Experiment


def with_experts(dense: Experiment, overrides: Sequence[str]) -> Experiment:
    """The dense experiment with a section `moe`, which the overrides `moe.key=value` fill.

    Raises ConfigError where the rules refuse it.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-moe-upcycle-") as folder:
        file = Path(folder) / "dense.yaml"
        file.write_text(to_yaml(dense), encoding="utf-8")
        try:
            return load(file, [*in_one_process(dense), *overrides]).experiment
        except ConfigError as error:
            # Nobody knows that file.
            raise ConfigError(*(line.removeprefix(f"{file}: ") for line in error.problems)) from None
