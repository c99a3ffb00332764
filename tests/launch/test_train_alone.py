"""`train` from a shell: what it prints, leaves behind and exits with, over a stand-in for training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_ranks import wait_until
from stand_in_training import EXPERIMENT, install

from megatron_moe.config.loading import load

MEETS = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1) + rank
dist.all_reduce(total)
(run_folder / f"total_{rank}").write_text(str(total.item()))
dist.destroy_process_group()
"""


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    program = "import sys; from megatron_moe.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


STARTING = "small: starting 2 ranks\n"


def train(config: Path, *overrides: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(config, *overrides)
    output, errors = process.communicate()
    return process.returncode, output, errors


def test_a_run_from_start_to_finish_and_on(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch, MEETS)
    run = tmp_path / "runs" / "small"

    assert train(config) == (0, STARTING, "")
    assert [(run / f"total_{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]
    assert (run / "config.yaml").read_text() == EXPERIMENT
    assert load(run / "resolved.yaml").experiment == load(config).experiment
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2

    (run / "trained_by_0").unlink()
    code, output, errors = train(config)
    assert (code, errors) == (0, "") and "is finished: 4 of 4" in output
    assert not (run / "trained_by_0").exists()

    code, output, errors = train(config, "model.hidden_size=32", "optimizer.lr=0.5")
    assert (code, output) == (2, "")
    lines = errors.splitlines()
    assert any(line.startswith("model.hidden_size: is 32, but was 16") for line in lines)
    assert any(line.startswith("optimizer.lr: is 0.5, but was 0.0003") for line in lines)
    assert load(run / "resolved.yaml").experiment == load(config).experiment

    code, output, errors = train(config, "training.train_iters=5")
    assert (code, errors) == (0, "") and "training.train_iters 4 -> 5" in output
    assert load(run / "resolved.yaml").experiment.training.train_iters == 5
    assert (run / "trained_by_0").exists()


def test_the_launcher_does_not_load_torch(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch)
    program = """
import sys
from pathlib import Path
from megatron_moe.launch import command
command.run_ranks = lambda *_, **__: sys.exit("torch" in sys.modules)
command.train(Path(sys.argv[1]), [])
"""
    assert subprocess.run([sys.executable, "-c", program, str(config)]).returncode == 0


def test_wrong_input_leaves_no_run_folder(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch)
    changes = (
        "data.kind=pretraining",
        f"data.path={tmp_path}/nothing",
        "data.tokenizer.kind=bytes",
        "model.vocab_size=300",
    )
    code, output, errors = train(config, *changes)
    assert (code, output) == (2, "")
    assert "data.path" in errors and "Traceback" not in errors
    assert not (tmp_path / "runs" / "small").exists()
    code, _, errors = train(config, f"logging.root={config}")
    assert (
        code == 2 and errors.startswith(f"logging.root: {config}: cannot write") and errors.count("\n") == 1
    )


def test_what_lies_in_the_place_of_checkpoints_is_named(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch)
    run = tmp_path / "runs" / "small"
    (run / "checkpoints" / "latest").mkdir(parents=True)
    code, output, errors = train(config)
    assert (code, output) == (2, "")
    assert errors.startswith("runs/small/checkpoints/latest: is a folder") and errors.count("\n") == 1
    (run / "checkpoints" / "latest").rmdir()
    (run / "checkpoints").rmdir()
    (run / "checkpoints").touch()
    code, output, errors = train(config)
    assert (code, output) == (2, "")
    assert errors.startswith("runs/small/checkpoints: is no folder") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "code", "begins", "ends"),
    [
        ("if rank == 1: raise ValueError('broken')", 1, "rank 1 failed:\nTraceback", "ValueError: broken\n"),
        (
            "from megatron_moe.config.errors import InputError\nraise InputError('data.split: empty')",
            2,
            "data.split: empty\n",
            "data.split: empty\n",
        ),
    ],
)
def test_errors_of_ranks_are_shown_once(tmp_path, monkeypatch, body, code, begins, ends):
    config = install(tmp_path, monkeypatch, body)
    ended, output, errors = train(config)
    assert (ended, output) == (code, STARTING)
    assert errors.startswith(begins) and errors.endswith(ends) and errors.count(ends) == 1


def test_warnings_of_libraries_go_to_a_file(tmp_path, monkeypatch):
    body = "import warnings, logging; warnings.warn('old call'); logging.getLogger('library').warning('slow')"
    assert train(install(tmp_path, monkeypatch, body)) == (0, STARTING, "")
    for rank in range(2):
        text = (tmp_path / "runs" / "small" / "logs" / f"rank_{rank}.txt").read_text()
        assert "old call" in text and "library: slow" in text


def test_one_job_at_a_time_and_a_stopped_one_asks_to_be_started_again(tmp_path, monkeypatch):
    """The ranks here have not come to where training saves on SIGTERM: nothing is lost, start again."""
    config = install(tmp_path, monkeypatch, "import time; time.sleep(600)")
    run = tmp_path / "runs" / "small"
    first = start(config)
    wait_until(lambda: all((run / f"trained_by_{rank}").exists() for rank in range(2)))

    code, output, errors = train(config)
    assert (code, output) == (2, "")
    assert f"in use by another job (process {first.pid} on" in errors and errors.count("\n") == 1

    first.send_signal(signal.SIGTERM)
    output, errors = first.communicate()
    assert first.returncode == 75
    assert errors.startswith("Stopping") and errors.count("\n") == 1
    assert (run / "requeue").exists()

    monkeypatch.setenv("FAKE_TRAINING", "pass")
    assert train(config) == (0, STARTING, "")
    assert not (run / "requeue").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_data_is_made_leaves_nothing_behind(tmp_path, monkeypatch, number):
    config = install(tmp_path, monkeypatch)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"the {word} of number {word}\n\n" for word in range(400_000)))
    prepare = f"{{input: [{corpus}], documents: paragraph}}"
    process = start(config, f"data={{kind: pretraining, prepare: {prepare}, tokenizer: {{vocab_size: 100}}}}")
    # The staging folder of the data: from here on sentencepiece, then the encoding works.
    wait_until(lambda: any((tmp_path / "runs").glob("_prepared/*")))
    process.send_signal(number)
    output, errors = process.communicate()
    assert (process.returncode, output) == (75, "")
    assert errors.splitlines()[-1] == "Stopped before the training began." and "Traceback" not in errors
    assert not any(path.is_file() for path in (tmp_path / "runs").rglob("*"))
