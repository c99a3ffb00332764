"""The benchmark of the sinks runs, and every sink got each step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import REPOSITORY
from test_benchmark_training import TINY


@pytest.mark.slow
def test_prints_a_row_for_each_way_to_run(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(quickstart=REPOSITORY / "configs" / "quickstart.yaml"))
    done = subprocess.run(
        [sys.executable, "tools/benchmark_sinks.py", str(config), "--repetitions", "2", "--steps", "1"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| metrics.jsonl alone",
        "| with TensorBoard",
        "| with Weights & Biases",
        "| with both",
    ]
