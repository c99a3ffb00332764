"""However a run is broken off, started again it becomes the run that was not: to the bit, from a shell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import install, train
from training_runs import assert_same, checkpoint, records, tensors

pytestmark = [pytest.mark.second_pair, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The run folder of a run that nothing happened to."""
    config = install(tmp_path_factory.mktemp("unbroken"))
    code, output, errors = train(config)
    assert code == 0, errors
    assert "Trained 8 steps." in output
    return config.parent / "runs" / "small"


def same(run: Path, unbroken: Path) -> None:
    assert records(run) == records(unbroken)
    assert_same(tensors(checkpoint(run, 8)), tensors(checkpoint(unbroken, 8)))


def newest(run: Path) -> int:
    names = sorted(path.name for path in (run / "checkpoints").glob("iter_*"))
    return int(names[-1].removeprefix("iter_"))


def test_killed_at_every_bad_moment(unbroken, tmp_path):
    config = install(tmp_path)
    run = tmp_path / "runs" / "small"
    latest = run / "checkpoints" / "latest"

    # The launcher dies, and its ranks with it, in a run that saves for the first time after two steps.
    code, _, _ = train(config, "checkpoint.save_interval=2", break_at="launcher")
    assert code == -9 and len(records(run)) == 2 and not latest.exists()

    # The launcher's lock was released, and the run begins from nothing.
    code, _, errors = train(config, "checkpoint.save_interval=3", break_at="before latest")
    assert code == 1 and "killed by signal 9" in errors
    assert newest(run) == 3 and not latest.exists()

    code, output, errors = train(config, break_at="inside a save")
    assert code == 1 and "killed by signal 9" in errors
    assert "Resuming from runs/small/checkpoints/iter_0000003: 3 of 8 steps done" in output
    assert newest(run) == 3 and latest.read_text() == "iter_0000003\n"
    assert list(latest.parent.glob(".*.part")) and len(records(run)) == 4

    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "loss": 5.4')
    code, output, errors = train(config)
    assert (code, errors) == (0, "")
    assert "iter_0000003: 3 of 8" in output
    assert not list(latest.parent.glob(".*"))
    same(run, unbroken)


def test_stopped_by_a_signal(unbroken, tmp_path):
    config = install(tmp_path)
    run = tmp_path / "runs" / "small"

    code, output, errors = train(config, "checkpoint.save_interval=3", break_at="signal")
    assert code == 75 and "Stopped after step 4 of 8; everything is saved." in output
    assert errors.splitlines()[-1].startswith("Stopping")
    assert newest(run) == 4 and (run / "requeue").exists()

    code, output, errors = train(config, "checkpoint.save_interval=3")
    assert (code, errors) == (0, "") and not (run / "requeue").exists()
    same(run, unbroken)

    code, output, errors = train(config, "checkpoint.save_interval=3")
    assert (code, errors) == (0, "") and "is finished: 8 of 8" in output


def test_a_full_disk_is_one_line_and_costs_nothing(unbroken, tmp_path):
    config = install(tmp_path)
    shutil.copytree(unbroken, tmp_path / "runs" / "small")
    run = tmp_path / "runs" / "small"
    code, _, errors = train(
        config, "training.train_iters=9", "optimizer.lr_decay_iters=8", break_at="disk full"
    )
    assert code == 1 and "Traceback" not in errors, errors
    line = errors.splitlines()[-1]
    assert line.startswith(
        "runs/small/checkpoints: cannot save the checkpoint after step 9: No space left on"
    )
    assert newest(run) == 8
    assert_same(tensors(checkpoint(run, 8)), tensors(checkpoint(unbroken, 8)))
