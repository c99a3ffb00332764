"""The benchmark's start-up part: how long a user waits for an answer, and for the first step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLL_S = 0.01
DEADLINE_S = 300.0


def answer_s(*arguments: str) -> float:
    """Seconds from start to end of `megatron-moe ARGUMENTS`, which must succeed."""
    started = time.perf_counter()
    subprocess.run([*_PROGRAM, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_step_s(config: Path) -> tuple[float, float]:
    """Seconds from the start of `train` to the first line of metrics.jsonl: with the data still to be
    prepared, and prepared."""
    with tempfile.TemporaryDirectory(prefix="megatron-moe-benchmark-") as root:
        return _until_first_line(config, root, "cold"), _until_first_line(config, root, "warm")


def _until_first_line(config: Path, root: str, name: str) -> float:
    metrics = Path(root, name, "metrics.jsonl")
    arguments = ["train", str(config), f"logging.root={root}", f"name={name}", "training.train_iters=1"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*_PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (metrics.exists() and metrics.read_bytes().endswith(b"\n")):
        time.sleep(POLL_S)
        if process.poll() not in (None, 0) or time.perf_counter() - started > DEADLINE_S:
            process.kill()
            raise RuntimeError(f"`train {config}` gave no step: {process.communicate()[1]}")
    waited = time.perf_counter() - started
    process.communicate()
    return waited


_PROGRAM = [sys.executable, "-m", "megatron_moe"]
