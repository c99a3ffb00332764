"""`megatron-moe verify` on the quickstart, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BYTES = ("data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=null")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = REPOSITORY / "configs" / "quickstart.yaml"
    command = [
        sys.executable,
        "-m",
        "megatron_moe",
        "verify",
        str(config),
        "--steps",
        "1",
        "logging.root=runs",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


def test_a_right_layout_passes_and_leaves_no_run_behind(tmp_path: Path) -> None:
    done = run(tmp_path, "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 step on 2 ranks (PP 2)" in done.stdout
    assert "PASS" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    assert not (tmp_path / "runs" / "quickstart").exists()


def test_a_difference_above_the_tolerance_ends_with_1(tmp_path: Path) -> None:
    done = run(tmp_path, "--tolerance", "1e-12", *BYTES, "model.num_layers=1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
