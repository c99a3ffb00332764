"""What the end of a run tells the user to do next works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.loading import load
from megatron_moe.config.resume import differences
from megatron_moe.training.summary import about_skips, to_train_on

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer.lr_warmup_fraction=null"],
        ["optimizer.lr_warmup_fraction=null", "optimizer.lr_warmup_iters=7"],
        ["optimizer.lr_decay_iters=150"],
        ["optimizer.lr_decay_iters=1000"],
    ],
)
def test_a_finished_run_trains_on_as_it_is_told(overrides: list[str]) -> None:
    """With the command that started it, and what the hint adds."""
    finished = load(QUICKSTART, overrides).experiment
    longer = load(QUICKSTART, [*overrides, to_train_on(finished)]).experiment
    assert longer.training.train_iters == 2 * finished.training.train_iters
    _, refused = differences(finished, longer)
    assert refused == []


@pytest.mark.parametrize(
    ("skips", "words"),
    [
        ([False, False], ""),
        ([False, True], " 1 of them was skipped and changed no weight; metrics.jsonl says why."),
        ([True, True], " All 2 were skipped and changed no weight; metrics.jsonl says why."),
    ],
)
def test_skipped_steps_are_counted(tmp_path: Path, skips: list[bool], words: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records: list[dict[str, Any]] = [{"loss": 1.0} | ({"skipped": "why"} if skip else {}) for skip in skips]
    metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert about_skips(metrics, len(skips)) == words
