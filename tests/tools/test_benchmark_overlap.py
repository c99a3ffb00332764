"""The benchmark of overlapped exchanges runs to its end; its numbers are nobody's promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_overlap.py"
SIZES = {"experts": 4, "hidden": 16, "width": 16, "tokens": 8, "degrees": 2, "repeats": 1}


def test_two_ranks_over_the_loopback_fill_the_table() -> None:
    path = os.pathsep.join([str(TOOL.parents[1]), os.environ.get("PYTHONPATH", "")])
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, str(TOOL), "--rate", "none", *sizes]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [
        "computation alone",
        "exchange alone",
        "1 part",
        "2 parts",
    ]
