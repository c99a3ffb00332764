"""A profile that training passes over is said at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moe import cli
from megatron_moe.config.loading import load
from megatron_moe.plan import devices, profile
from megatron_moe.plan.profile import Piece, Profile

CONFIG = """
name: passed_over
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, vocab_size: 250}}
data: {{kind: mock}}
pipeline: {{layers_per_stage: auto}}
training: {{train_iters: 1, global_batch_size: 2, seq_length: 32}}
logging: {{root: {root}, curves: false}}
"""
PIECE = Piece(0.001, 0.002, 0.0009, 0.0008, 0.0, 0.0, 1000.0, 100.0, 500.0)


@pytest.mark.parametrize("ranks", [1, 4])
def test_training_says_once_that_a_profile_is_of_something_else(tmp_path: Path, ranks: int) -> None:
    config = tmp_path / "passed_over.yaml"
    config.write_text(CONFIG.format(root=tmp_path / "runs"))
    experiment = load(config).experiment
    measured = Profile(
        settings=profile.settings_of(experiment),
        device=devices.processor(),
        on_host=True,
        ranks=1,
        threads=1,
        versions={},
        pieces={"embedding": PIECE, "dense": PIECE, "head": PIECE},
        optimizer_s=0.01,
        optimizer_parameters=1000,
    )
    replace(measured, ranks=ranks).write(profile.path_of(experiment))
    assert cli.main(["train", str(config)]) == 0
    log = (tmp_path / "runs" / "passed_over" / "log.txt").read_text()
    assert log.count("profile.json is not taken, it was measured with 4 ranks at once (here 1)") == (
        ranks > 1
    )
