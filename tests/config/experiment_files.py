"""Experiments written to files, for the tests of config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.loading import Loaded, load

DENSE = """\
name: small
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}
data: {kind: mock, tokenizer: {kind: bytes}}
training: {train_iters: 10, global_batch_size: 8, seq_length: 64}
"""
MOE = DENSE + "moe: {num_moe_experts: 8}\n"


def loaded(folder: Path, text: str, *overrides: str, world_size: int | None = None) -> Loaded:
    """Load `text` from a file `experiment.yaml` in `folder`."""
    path = folder / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides, world_size)


def problems(
    folder: Path, text: str, overrides: Sequence[str] = (), world_size: int | None = None
) -> list[str]:
    """What is wrong with it, the folder's name taken out of the lines; empty if nothing is."""
    try:
        loaded(folder, text, *overrides, world_size=world_size)
    except ConfigError as error:
        return [problem.replace(f"{folder}/", "") for problem in error.problems]
    return []
