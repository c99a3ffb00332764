"""What the end of a run tells the user to do next works."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe.config.loading import load
from megatron_moe.config.resume import differences
from megatron_moe.training.summary import to_train_on

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
