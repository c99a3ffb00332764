"""Event files hold the numbers of metrics.jsonl, each step once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from distributed import ranks
from experiments import MOE, experiment
from sinks_and_runs import feed
from train_on_ranks import train_all

from megatron_moe.training.callbacks.tensorboard import TensorBoard


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Key -> steps with values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        key: [(event.step, event.value) for event in reader.Scalars(key)] for key in reader.Tags()["scalars"]
    }


@pytest.mark.second_pair
def test_a_run_writes_the_numbers_of_its_metrics(tmp_path):
    made = experiment(
        {**MOE, "moe_layer_freq": [0, 0, 1, 1]},
        training={"train_iters": 4, "eval_interval": 2, "eval_iters": 1},
        logging={"tensorboard": True, "detail_interval": 2, "curves": True},
    )
    ranks(1).run(train_all, [(made, tmp_path)])
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("iteration")
        for key, value in record.items():
            layers = (
                {f"{key}/{n}": entry for n, entry in enumerate(value)}
                if isinstance(value, list)
                else {key: value}
            )
            for name, number in layers.items():
                if number is not None:
                    expected.setdefault(name, []).append((step, number))
    written = read_back(tmp_path / "tensorboard")
    assert written.keys() == expected.keys()
    assert {"loss", "eval/loss", "moe/drop_rate", "moe/per_layer/drop_rate/2"} <= written.keys()
    assert "moe/per_layer/drop_rate/0" not in written
    for key in expected:
        assert written[key] == [(step, float(np.float32(value))) for step, value in expected[key]], key
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_replaces_the_steps_behind_its_checkpoint(tmp_path):
    def start(done: int, last: int, loss: float, error: bool = False) -> None:
        records = [{"iteration": n, "loss": loss, "skipped": "why"} for n in range(done + 1, last + 1)]
        feed(TensorBoard(tmp_path / "tb"), tmp_path / "log.txt", records, done, error)

    start(0, 7, loss=1.0, error=True)
    start(4, 6, loss=2.0)
    start(6, 8, loss=3.0)
    assert read_back(tmp_path / "tb") == {
        "loss": list(enumerate([1.0] * 4 + [2.0] * 2 + [3.0] * 2, start=1)),
        "skipped": [(number, 1.0) for number in range(1, 9)],
    }


def test_a_run_that_begins_again_replaces_everything(tmp_path):
    for loss in (1.0, 2.0):
        records = [{"iteration": n, "loss": loss} for n in (1, 2)]
        feed(TensorBoard(tmp_path / "tb"), tmp_path / "log.txt", records)
    assert read_back(tmp_path / "tb") == {"loss": [(1, 2.0), (2, 2.0)]}
