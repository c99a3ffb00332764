"""Ranks that need no torch: short programs that `run_ranks` starts, and a launcher of them as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import megatron_moe

PACKAGE_ROOT = str(Path(megatron_moe.__file__).parent.parent)

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from megatron_moe.config.errors import InputError
from megatron_moe.launch import reports
rank = int(os.environ["RANK"])
here = Path({here!r})

def report(error, code=1):
    try:
        raise error
    except Exception as caught:
        reports.of_exception(rank, caught, code).write(Path(os.environ[reports.FOLDER_VARIABLE]))
    os._exit(code)

def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)

def started():
    (here / f"started_{{rank}}").write_text(str(os.getpid()))

"""


def rank_program(here: Path, body: str) -> list[str]:
    """The command of a rank that runs `body`, which may use what `PREAMBLE` defines."""
    return [sys.executable, "-c", PREAMBLE.format(here=str(here)) + body]


def start_launcher(here: Path, body: str, world_size: int = 2, before: str = "") -> subprocess.Popen[str]:
    """A process that runs `run_ranks` over such ranks, prints the error and exits with the outcome's code."""
    program = f"""
import sys
from pathlib import Path
from megatron_moe.launch.supervisor import run_ranks
held = []
{before}
argv, logs = {rank_program(here, body)!r}, Path({str(here / "logs")!r})
outcome = run_ranks(argv, {world_size}, 1, logs, False, held=held, stop_message="STOPPING")
print(*outcome.problems, outcome.error, sep="\\n", file=sys.stderr)
sys.exit(outcome.exit_code)
"""
    environment = os.environ | {"PYTHONPATH": PACKAGE_ROOT}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process group of its own, as a shell would make: a test may signal all of it.
        process_group=0,
    )


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    """Wait for something that has to happen; the limit only keeps a broken test from hanging."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def pids_of(here: Path, world_size: int = 2) -> list[int]:
    """The process ids of ranks that call `started()`, as soon as all have."""
    paths = [here / f"started_{rank}" for rank in range(world_size)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
