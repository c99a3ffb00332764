"""`megatron-moe profile`: who starts what, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_moe.cli import main
from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.launch import preflight
from megatron_moe.launch.beginning import begin
from megatron_moe.plan import plan, profile

EXPERIMENT = """\
name: tiny
model: {num_layers: 4, hidden_size: 32, num_attention_heads: 4, vocab_size: 250}
moe: {num_moe_experts: 4, moe_ffn_hidden_size: 48}
parallel: {pipeline_model_parallel_size: 2}
data: {kind: mock}
training: {train_iters: 2, global_batch_size: 4, seq_length: 32}
logging: {curves: false, detail_interval: 1}
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(EXPERIMENT)
    return path


def test_the_planner_takes_what_was_measured(config, capfd):
    assert main(["profile", str(config)]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "measuring with 2 ranks" in said.out and "runs/tiny/profile.json" in said.out
    assert all(kind in said.out for kind in ("embedding", "moe", "head"))
    found = profile.read(Path("runs/tiny/profile.json"))
    assert (found.ranks, found.on_host, found.kinds) == (2, True, {"embedding", "moe", "head"})
    assert main(["plan", str(config)]) == 0
    assert "times from measurements on" in capfd.readouterr().out
    # A run folder that holds a profile is still that of a new run.
    loaded = load(config, [], world_size=None)
    job = begin(loaded, plan.make(loaded.experiment), print)
    job.locked.release()
    assert not job.finished
    assert "measurements on" in json.loads(Path("runs/tiny/plan.json").read_text())["forecast"]["source"]


def test_a_profile_of_another_layout_stands_in_nobodys_way(config):
    """`verify` compares with one process, and `profile` replaces what there is."""
    dropping = load(config, ["model.attention_dropout=0.1"], world_size=None)
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/profile.json").write_text("{}")
    preflight.check(dropping)
    with pytest.raises(InputError, match="is no profile"):
        plan.make(dropping.experiment)
    assert plan.make(dropping.experiment, profiled=False).stages


def test_what_is_refused(config, monkeypatch, capsys):
    merged = ["moe.overlap_moe_expert_parallel_comm=true", "training.precision=bf16"]
    merged += ["parallel.expert_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1"]
    assert main(["profile", str(config), *merged]) == 2
    assert "cannot be told apart" in capsys.readouterr().err
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["profile", str(config)]) == 2
    assert "without torchrun or srun" in capsys.readouterr().err
    assert not Path("runs").exists()
