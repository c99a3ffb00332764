"""Whatever a sink does, the run goes on; it is told once."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import ranks
from experiments import MOE, experiment
from sinks_and_runs import feed
from train_on_ranks import train_all

from megatron_moe.training.callbacks.sink import Sink, SinkError, values

STEPS = [{"iteration": number, "loss": 1.0} for number in range(1, 6)]


class Breaking(Sink):
    """Breaks, or waits for ever, in one of its methods."""

    key = "logging.breaking"
    patience_s = 0.2

    def __init__(self, where: str, how: Exception | None) -> None:
        self.where, self.how = where, how
        self.taken: list[Any] = []

    def _do(self, where: str) -> None:
        if where == self.where:
            if self.how is not None:
                raise self.how
            threading.Event().wait(20)

    def open(self, iteration: int) -> None:
        self._do("open")

    def write(self, values: Any) -> None:
        self._do("write")
        self.taken.append(values)

    def close(self, completed: bool) -> None:
        self._do("close")


@pytest.mark.parametrize("where", ["open", "write", "close"])
@pytest.mark.parametrize("how", [SinkError("the line is dead"), KeyError("name"), None])
def test_a_sink_that_breaks_is_told_once(tmp_path, capsys, where, how):
    started = time.monotonic()
    feed(Breaking(where, how), tmp_path / "log.txt", STEPS, pause_s=0.02)
    assert time.monotonic() - started < 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("logging.breaking: ") and line.endswith(".")
    if how is not None:
        assert ("the line is dead" if isinstance(how, SinkError) else "KeyError: 'name'") in line
    assert (tmp_path / "log.txt").read_text() == line + "\n"


def test_a_sink_that_falls_behind_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_moe.training.callbacks.sink._WAITING", 3)
    feed(Breaking("open", None), tmp_path / "log.txt", STEPS)
    assert "3 steps behind" in capsys.readouterr().out


def test_a_sink_takes_plain_numbers_and_texts():
    record = {
        "iteration": 3,
        "loss": float("nan"),
        "lr": 0.5,
        "skipped": "why",
        "moe/x": [None, 0.25, float("inf")],
    }
    assert values(record) == {"iteration": 3, "lr": 0.5, "skipped": "why", "moe/x/1": 0.25}


class Watching(Sink):
    """Compares each step with the last line of metrics.jsonl."""

    key = "logging.watching"

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics

    def write(self, values: Any) -> None:
        lines = self.metrics.read_text().splitlines()
        assert json.loads(lines[int(values["iteration"]) - 1])["loss"] == values["loss"]


def train_watched(run_experiment: Any, run: Path) -> list[str]:
    """Train with a watching sink among the callbacks. Returns what was said of it."""
    from unittest import mock

    from megatron_moe.training import run as running

    with mock.patch.object(running, "sinks", lambda folder, _: [Watching(folder / "metrics.jsonl")]):
        train_all([(run_experiment, run)])
    return [line for line in (run / "log.txt").read_text().splitlines() if "watching" in line]


def test_a_sink_sees_what_is_in_the_file_already(tmp_path):
    made = experiment(MOE, training={"train_iters": 3})
    assert ranks(1).run(train_watched, made, tmp_path / "run") == [[]]


def test_ranks_hold_no_wandb(tmp_path):
    assert ranks(1).run(loaded_wandb) == [None]


def loaded_wandb() -> Any:
    import sys

    from megatron.core import timers

    return sys.modules.get("wandb") or timers.wandb
