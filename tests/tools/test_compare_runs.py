"""Runs beside each other: what the table says of them, and that the picture is there."""

from __future__ import annotations

import json
from pathlib import Path

import compare_runs
import pytest
from distributed import REPOSITORY

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.loading import load

STEPS = [
    {"iteration": 1, "loss": 4.0, "consumed_tokens": 20_480_000},
    {"iteration": 2, "loss": None, "consumed_tokens": 40_960_000, "eval/loss": 2.5},
    {"iteration": 3, "loss": 3.0, "consumed_tokens": 61_440_000, "eval/loss": 2.75},
]
ALIKE = "moe/per_layer/expert_similarity"


def run(folder: Path, steps: list[dict[str, object]], *overrides: str) -> Path:
    """A run folder with these steps of the quickstart."""
    folder.mkdir()
    experiment = load(REPOSITORY / "configs" / "quickstart.yaml", overrides).experiment
    (folder / "resolved.yaml").write_text(to_yaml(experiment))
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
    return folder


def test_the_table_has_losses_compute_and_likeness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = [{**step, ALIKE: [None, 1.0 - 0.1 * step["iteration"], 1.0]} for step in STEPS]
    mixture = run(tmp_path / "mixture", alike)
    dense = run(tmp_path / "dense", STEPS, "moe=null", "model.ffn_hidden_size=384")
    picture = tmp_path / "picture.png"
    assert compare_runs.main([str(picture), f"a=b={mixture}", f"dense={dense}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    first, second = (row.strip("|").split("|") for row in capsys.readouterr().out.splitlines()[2:])
    assert [cell.strip() for cell in first[:3]] == ["a=b", "2.8 (1.1)", "3, 61,440,000"]
    assert [cell.strip() for cell in first[4:]] == ["4.000", "2.750 (2.500)", "5.0e-02 to 1.5e-01"]
    assert second[6].strip() == ""
    # Queries, keys, values and the projection back; the feed-forward's three matrices; the output layer.
    weights = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384) + 128 * 1024
    scores = 4 * 2 * 128 * 4 * (32 + 32)
    assert float(second[3]) == pytest.approx(3 * (2 * weights + scores) * 61_440_000 / 1e12, abs=0.05)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_runs.main([str(tmp_path / "picture.png"), f"nothing={tmp_path / 'nothing'}"])
    assert f"{tmp_path / 'nothing'}: no run" in capsys.readouterr().err
