"""Weights & Biases: what it is given, and that nothing it does reaches the run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from experiments import experiment
from sinks_and_runs import feed, offline_steps

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.training.callbacks import wandb_process
from megatron_moe.training.callbacks.weights_and_biases import WeightsAndBiases, mode_of

SECRET = "5ec4e7" + "0123456789" * 3 + "abcd"  # of the form of an API key


def made(mode: str = "online") -> Experiment:
    return experiment(logging={"wandb": {"project": "moe", "mode": mode}})


def steps(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {"iteration": n, "loss": 1 / n, "grad_norm": None, "moe/x": [None, 2.0 * n]}
        for n in range(first, last + 1)
    ]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A home without an account, and folders in which strays would be seen."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("home", "tmp", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def left_behind(machine: Path) -> list[str]:
    """Files in the wrong places, and processes that still run for this machine."""
    strays = [str(path) for name in ("tmp", "here") for path in (machine / name).iterdir()]
    mark = f"TMPDIR={machine / 'run' / 'wandb' / 'tmp'}".encode()
    deadline = time.monotonic() + 10
    while running := [pid for pid in os.listdir("/proc") if pid.isdecimal() and mark in _environment(pid)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return strays + running


def _environment(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.second_pair
def test_offline_runs_lie_in_the_run_folder_under_one_id(machine, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    monkeypatch.setattr(WeightsAndBiases, "patience_s", 60.0)
    run = machine / "run"
    run.mkdir()
    feed(WeightsAndBiases(run, made("offline"), "offline"), run / "log.txt", steps(1, 5))
    # Cut back to step 3, as by a resume.
    feed(WeightsAndBiases(run, made("offline"), "offline"), run / "log.txt", steps(4, 7), done=3)
    first, second = offline_steps(run)
    expected = [{"_step": n, "iteration": n, "loss": 1 / n, "moe/x/1": 2.0 * n} for n in range(1, 8)]
    assert first + second == expected and len(first) == 5
    names = [path.name.rpartition("-")[2] for path in sorted((run / "wandb").glob("offline-run-*"))]
    assert len(names) == 2 and len(set(names)) == 1
    assert left_behind(machine) == []
    assert not any(SECRET.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert capsys.readouterr() == ("", "")


def test_without_an_account_the_run_is_told_once(machine, capsys):
    run = machine / "run"
    run.mkdir()
    took = feed(WeightsAndBiases(run, made(), "online"), run / "log.txt", steps(1, 8), pause_s=0.5)
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        line.startswith("logging.wandb: ") and "wandb login" in line and "logging.wandb.mode=offline" in line
    )
    assert took < 5 and left_behind(machine) == []


def test_a_server_that_never_answers_is_not_waited_for(machine, monkeypatch, capsys):
    run = machine / "run"
    run.mkdir()
    monkeypatch.setattr(WeightsAndBiases, "patience_s", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        took = feed(WeightsAndBiases(run, made(), "online"), run / "log.txt", steps(1, 3), pause_s=0.7)
    assert took < 5
    assert "no answer" in capsys.readouterr().out
    assert left_behind(machine) == []


def test_it_ends_with_a_rank_that_is_killed(machine):
    program = (
        "import os, signal, sys, time\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from test_weights_and_biases import WeightsAndBiases, made, steps\n"
        "from sinks_and_runs import Feed\n"
        "run = Path(sys.argv[1])\n"
        "feed = Feed(WeightsAndBiases(run, made('offline'), 'offline'), run / 'log.txt')\n"
        "feed.on_start(SimpleNamespace(iteration=0))\n"
        "[feed.on_step(None, step) for step in steps(1, 3)]\n"
        "while '\"iteration\": 3' not in (run / 'wandb/run.json').read_text(): time.sleep(0.05)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = machine / "run"
    (run / "wandb").mkdir(parents=True)
    (run / "wandb" / "run.json").write_text('{"id": "x", "iteration": 0}')
    subprocess.run([sys.executable, "-c", program, str(run)], check=False, timeout=60)
    assert left_behind(machine) == []
    assert [[step["iteration"] for step in steps] for steps in offline_steps(run)] == [[1, 2, 3]]


class Recorder(ModuleType):
    """A stand-in for the module wandb that writes down what it is asked for."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.Settings = lambda **settings: settings

    def init(self, **arguments: Any) -> Any:
        self.calls.append(("init", arguments))
        return SimpleNamespace(
            url="https://server/moe/runs/one",
            log=lambda values, step: self.calls.append(("log", (step, values))),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, *messages: dict[str, Any]) -> Recorder:
    """What wandb is asked for by a run that goes on under the id `one` behind step 5."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    monkeypatch.setattr(wandb_process.signal, "alarm", lambda seconds: None)
    state = tmp_path / "run.json"
    state.write_text('{"id": "one", "iteration": 5}')
    start = {
        "project": "moe",
        "entity": "team",
        "mode": mode,
        "name": "tiny",
        "folder": str(tmp_path),
        "state": str(state),
        "config": made().model_dump(mode="json"),
        "patience_s": 1.0,
    }
    wandb_process.serve(json.dumps(message) for message in (start, *messages))
    return recorder


@pytest.mark.parametrize(("mode", "logged"), [("online", [4, 5, 6]), ("offline", [6])])
def test_what_wandb_is_given(monkeypatch, tmp_path, mode, logged):
    messages = [{"iteration": n, "loss": 0.5} for n in (4, 5, 6)]
    recorder = served(monkeypatch, tmp_path, mode, *messages, {"exit_code": 0})
    kinds = [kind for kind, _ in recorder.calls]
    assert kinds == ["init", *["log"] * len(logged), "finish"]
    given = recorder.calls[0][1]
    assert (given["project"], given["entity"], given["name"], given["id"]) == ("moe", "team", "tiny", "one")
    assert (given["mode"], given["resume"], given["dir"]) == (mode, "allow", str(tmp_path))
    assert Experiment.model_validate(given["config"]) == made()
    # Online wandb leaves out what the server has; offline nobody else would.
    assert recorder.calls[1:-1] == [("log", (n, {"iteration": n, "loss": 0.5})) for n in logged]
    assert recorder.calls[-1] == ("finish", 0)
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "id": "one",
        "iteration": 6,
        "url": "https://server/moe/runs/one",
    }


def test_a_rank_that_dies_leaves_a_failed_run(monkeypatch, tmp_path):
    assert served(monkeypatch, tmp_path, "online", {"iteration": 6}).calls[-1] == ("finish", 1)


def test_a_run_that_begins_again_is_another_run(machine, monkeypatch):
    run = machine / "run"
    run.mkdir()
    ids = []
    for done in (0, 3, 0):
        sink = WeightsAndBiases(run, made("offline"), "offline")
        monkeypatch.setattr(sink, "_send", lambda message: None)
        monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **keywords: None)
        sink.open(done)
        ids.append(json.loads((run / "wandb" / "run.json").read_text())["id"])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, None),
        ({"WANDB_MODE": ""}, "online"),
    ],
)
def test_wandb_mode_comes_first(environment, expected):
    settings = made().logging.wandb
    assert settings is not None and mode_of(settings, environment) == expected


def test_wandb_mode_must_mean_something():
    settings = made().logging.wandb
    assert settings is not None
    with pytest.raises(InputError, match="WANDB_MODE: must be online, offline or disabled, not off"):
        mode_of(settings, {"WANDB_MODE": "off"})
