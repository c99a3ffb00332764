"""What the end of a run tells the user to do next works."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe.config.dump import to_yaml
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
def test_a_finished_run_trains_on_as_it_is_told(tmp_path: Path, overrides: list[str]) -> None:
    finished = load(QUICKSTART, overrides).experiment
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(finished))
    longer = load(resolved, to_train_on(finished)).experiment
    assert longer.training.train_iters == 2 * finished.training.train_iters
    _, refused = differences(finished, longer)
    assert refused == []
    iterations = f"training.train_iters={2 * finished.training.train_iters}"
    assert longer == load(QUICKSTART, [*overrides, iterations]).experiment
