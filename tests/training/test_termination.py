"""SIGTERM ends a run after the step in progress, on all ranks at once, with everything saved."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import train_on_ranks as on_ranks
from distributed import ranks
from experiments import experiment, layout
from training_runs import records

from megatron_moe.training.callbacks import termination


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    made = experiment(parallel=layout(pp=2), training={"train_iters": 6, "global_batch_size": 4})
    assert ranks(2).run(on_ranks.stopped_by_the_last_rank, made, tmp_path) == [2, 2]
    assert [record["iteration"] for record in records(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "iter_0000002\n"


@pytest.fixture
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def start(monkeypatch: pytest.MonkeyPatch, barrier: Any = lambda: None) -> Any:
    trainer = SimpleNamespace(stop_requested=False)
    monkeypatch.setattr(termination.dist, "barrier", barrier)
    termination.Termination().on_start(trainer)
    return trainer


def test_a_forked_worker_is_ended_and_asks_for_nothing(monkeypatch, handlers):
    trainer = start(monkeypatch)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")  # Python drops signals that come while it forks
        time.sleep(60)
        os._exit(1)
    os.read(reading, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert not trainer.stop_requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert trainer.stop_requested


@pytest.mark.parametrize("signalled", [True, False])
def test_before_all_ranks_have_begun_it_means_what_it_meant_before(monkeypatch, handlers, signalled):
    """A rank that is still starting leaves at once, with nothing to save; the others may not wait for it."""
    left: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: left.append(number))

    def barrier() -> None:
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        start(monkeypatch, barrier)
    assert left == [signal.SIGTERM] * signalled
