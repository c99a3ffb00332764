"""What a run says that does not write to a terminal, and in log.txt."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from experiments import experiment

from megatron_moe.training.callbacks.progress import ProgressBar

RECORD = {"loss": 5.25, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 12345.6}
SPECIAL: dict[int, dict[str, Any]] = {
    9: {"eval/loss": 5.5},
    10: {"moe/load_max_over_mean": 1.536, "moe/drop_rate": 0.0213, "moe/dead_experts": 0},
    20: {"moe/communication_ms": 8.2, "moe/exposed_communication_ms": 8.2},
    25: {"moe/communication_ms": 8.0, "moe/exposed_communication_ms": 2.0},
    12: {"loss": None, "grad_norm": math.nan, "skipped": "the gradient norm is not finite"},
}


def lines(log: Path, first: int, last: int) -> list[str]:
    """log.txt of a process that trained steps `first` to `last` of 25."""
    made = experiment(training={"train_iters": 25}, logging={"detail_interval": 10})
    trainer: Any = SimpleNamespace(experiment=made, iteration=first - 1, stopped=False)
    bar = ProgressBar(log)
    bar.on_start(trainer)
    for trainer.iteration in range(first, last + 1):
        trainer.stopped = trainer.iteration == last
        bar.on_step(trainer, {"iteration": trainer.iteration, **RECORD, **SPECIAL.get(trainer.iteration, {})})
    bar.on_end(trainer)
    return log.read_text().splitlines()


def test_a_line_for_every_step_that_is_worth_one(tmp_path, capsys):
    written = lines(tmp_path / "log.txt", 1, 25)
    assert capsys.readouterr().out.splitlines() == written
    assert [int(line[4:].split("/")[0]) for line in written] == [1, 9, 10, 12, 20, 25]
    assert written[0] == "step  1/25  loss 5.2500  12,346 tokens/s  lr 1.00e-03  grad norm 1.000"
    assert "loss 5.2500  held-out 5.5000" in written[1] and "held-out" not in written[2]
    assert written[2].endswith("grad norm 1.000  load max/mean 1.54  dropped 2.1%")
    assert written[4].endswith("exchange 8 ms, none hidden")
    assert written[5].endswith("exchange 8 ms, 75% hidden, 2 ms exposed")
    assert written[3].endswith("skipped: the gradient norm is not finite") and "loss -" in written[3]


def test_a_resumed_run_says_how_it_begins_and_a_stopped_one_how_it_ends(tmp_path):
    written = lines(tmp_path / "log.txt", 3, 7)
    assert [line[5:7] for line in written] == [" 3", " 7"]
    assert len(lines(tmp_path / "log.txt", 8, 8)) == 3, "the log is continued"
