"""`scripts/torchrun.sh`: filled in, it trains on one node and on two, as `train` does alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "torchrun.sh"
EXPERIMENT = """
name: small
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, vocab_size: 100}
moe: {num_moe_experts: 4, moe_ffn_hidden_size: 24}
parallel: {tensor_model_parallel_size: 2}
training: {train_iters: 2, global_batch_size: 4, seq_length: 16}
logging: {curves: false}
data: {kind: mock}
"""
STAGES = "parallel.pipeline_model_parallel_size=2"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment in the working directory, and a clean environment to start it from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT)
    return path


def start(*overrides: str, **variables: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *overrides],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*overrides: str, **variables: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(*overrides, **variables)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def losses(name: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run."""
    lines = (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_two_and_four_ranks_and_two_nodes_train_what_one_launch_trains(config: Path) -> None:
    alone = [sys.executable, "-m", "megatron_moe", "train", str(config), "name=alone"]
    assert subprocess.run(alone, capture_output=True, check=False).returncode == 0
    code, output, errors = run("name=joined", CONFIG=config, RANKS_PER_NODE=2)
    assert code == 0, errors
    assert output.count("Trained 2 steps.") == 1
    assert losses("joined") == losses("alone"), "the same layout: to the bit"

    meeting = {"NODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    second = start("name=nodes", CONFIG=config, RANKS_PER_NODE=1, NODE_RANK=1, **meeting)
    code, output, errors = run("name=nodes", CONFIG=config, RANKS_PER_NODE=1, NODE_RANK=0, **meeting)
    said, complained = second.communicate(timeout=60)
    assert (code, second.returncode) == (0, 0), errors + complained
    assert output.count("Trained 2 steps.") == 1 and said == "", "the first node speaks"
    assert losses("nodes") == losses("alone"), "wherever the ranks are: to the bit"

    code, _, errors = run("name=four", STAGES, CONFIG=config, RANKS_PER_NODE=4)
    assert code == 0, errors
    for one, other in zip(losses("four"), losses("alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-5), "no layout changes the mathematics"


def test_a_signal_saves_and_asks_to_be_started_again(config: Path) -> None:
    endless = ("parallel.tensor_model_parallel_size=1", "training.train_iters=100000")
    process = start(*endless, CONFIG=config, RANKS_PER_NODE=1)
    deadline = time.monotonic() + 200
    metrics = Path("runs/small/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert (Path("runs/small/checkpoints/latest")).exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "CONFIG is not filled in"),
        ({"CONFIG": "none.yaml"}, "CONFIG: there is no file none.yaml"),
        ({"RANKS_PER_NODE": "all"}, "RANKS_PER_NODE must be a whole number from 1 to 1000, not 'all'"),
        ({"RANKS_PER_NODE": "08"}, "RANKS_PER_NODE must be"),
        ({"RANKS_PER_NODE": "9" * 20}, "RANKS_PER_NODE must be"),
        ({"NODES": "2", "MASTER_PORT": "70000"}, "MASTER_PORT must be a whole number from 1 to 65535"),
        ({"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE must be"),
        ({"NODES": "two"}, "NODES must be a whole number"),
        ({"NODES": "2"}, "MASTER_ADDR is not filled in"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK is 2, but the nodes are numbered from 0 to 1"),
        ({"VENV": "nowhere"}, "VENV: there is no nowhere/bin/python"),
    ],
)
def test_what_is_not_filled_in_is_said(config: Path, variables: dict[str, str], words: str) -> None:
    filled = {"CONFIG": config.name, "RANKS_PER_NODE": "1"} if variables else {"RANKS_PER_NODE": "1"}
    code, output, errors = run(**(filled | variables))
    assert (code, output) == (2, "")
    assert errors.startswith(f"torchrun.sh: {words}") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("nvidia_smi", "words"),
    [("echo it has failed; exit 9", "nvidia-smi says: it has failed"), ("exit 0", "lists no GPUs")],
)
def test_gpus_that_cannot_be_counted(config: Path, tmp_path: Path, nvidia_smi: str, words: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    (tools / "nvidia-smi").chmod(0o755)
    code, _, errors = run(CONFIG=config, PATH=f"{tools}:{os.environ['PATH']}")
    assert code == 2 and errors.count("\n") == 1
    assert (
        errors.startswith("torchrun.sh: RANKS_PER_NODE is not filled in, and nvidia-smi") and words in errors
    )


def test_gpus_are_counted_where_nothing_is_said(config: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0'\necho 'GPU 1'\n")
    (tools / "nvidia-smi").chmod(0o755)
    (tools / "python").write_text("#!/bin/sh\necho \"$@\" >> calls\necho '# Run folder: runs/small'\n")
    (tools / "python").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    assert run("name=a b", CONFIG=config, PATH=path)[0] == 0
    validated, started = Path("calls").read_text().splitlines()
    assert validated == f"-m megatron_moe validate {config} name=a b"
    assert "--nnodes 1 --nproc-per-node 2 --standalone" in started
    assert started.endswith(f"-m megatron_moe train {config} name=a b")


def test_a_mistake_in_the_experiment_is_said_once(config: Path) -> None:
    code, output, errors = run("training.train_iters=none", CONFIG=config, RANKS_PER_NODE=2)
    assert (code, output) == (2, "")
    assert errors.startswith("override training.train_iters: must be") and errors.count("\n") == 1
