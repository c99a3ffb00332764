"""Processes that cannot outlive the one that started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1


def start_bound(
    argv: Sequence[str],
    environment: Mapping[str, str],
    output: IO[bytes] | None,
    held: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process that the kernel kills when this one dies, however it dies.

    It stays in this process group, but leaves the terminal's Ctrl-C and hang-up to us, so that we decide what
    they mean. Call from the main thread: the kernel takes the death of the calling thread for ours.

    Args:
        output: takes its stdout and stderr; None shares ours.
        held: file descriptors that it keeps open.
    """
    return subprocess.Popen(
        argv,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=tuple(held),
        preexec_fn=_bind_to(os.getpid()),
    )


def _bind_to(parent: int) -> Callable[[], None]:
    # Loaded before the fork: little may be done between it and exec.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def bind() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # A parent that died before the call above sends no signal any more.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return bind


def end_leftovers(mark: str, grace_s: float) -> None:
    """Kill what still runs with `mark` in its environment, `grace_s` seconds from now at the latest.

    These are processes that a rank started and did not end, such as a checkpoint writer's workers: they keep
    its standard output open, and whoever reads that to its end would wait for ever.
    """
    deadline = time.monotonic() + grace_s
    while leftovers := _marked(mark.encode()):
        if time.monotonic() >= deadline:
            for pid in leftovers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def _marked(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # Other users' processes, and those that just ended, cannot be read.
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found
