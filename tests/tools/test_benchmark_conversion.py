"""The benchmark of conversion runs, and has a row for each way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import REPOSITORY


@pytest.mark.slow
def test_prints_a_row_for_each_way(tmp_path: Path) -> None:
    arguments = ["--folder", str(tmp_path), "--gigabytes", "0.1", "--without-peers"]
    done = subprocess.run(
        [sys.executable, "tools/benchmark_conversion.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[-2:] == ["| megatron-moe import", "| megatron-moe export"]
    assert not list(tmp_path.iterdir())
