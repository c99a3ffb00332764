"""A training room of a few lines, so that launching can be tested without training."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_ranks import PACKAGE_ROOT

EXPERIMENT = """
name: small  # a comment that only the user's own text has
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, vocab_size: 100}
parallel: {data_parallel_size: 2}
training: {train_iters: 4, global_batch_size: 4, seq_length: 8}
data: {kind: mock}
"""

# Python runs a file of this name at its start: also in ranks that torchrun starts.
SITE = """
import os, sys, types

def train(run_folder, experiment, plan):
    rank = int(os.environ["RANK"])
    (run_folder / f"trained_by_{rank}").touch()
    exec(os.environ["FAKE_TRAINING"])
    checkpoint = run_folder / "checkpoints" / f"iter_{experiment.training.train_iters:07d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "about.json").write_text('{"tokenizer_sha256": null, "data": null}')
    return 0

def newest(run_folder):
    return max((run_folder / "checkpoints").glob("iter_*"), default=None)

for name, function in (("training.run", train), ("engine.checkpoint_folders", newest)):
    module = types.ModuleType(f"megatron_moe.{name}")
    setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str = "") -> Path:
    """From here on, in every Python process, training is `body`. Returns an experiment's file."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{site}:{PACKAGE_ROOT}")
    monkeypatch.setenv("FAKE_TRAINING", body or "pass")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.chdir(folder)
    config = folder / "small.yaml"
    config.write_text(EXPERIMENT)
    return config
