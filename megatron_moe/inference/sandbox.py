"""Runs programs that nobody has read: without network, as nobody, with limits.

Each program is a process in Linux namespaces of its own: no network, no other process in sight, all files
read-only but for a small folder in memory. Where the system does not allow that, nothing is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.errors import InputError
from megatron_moe.inference import sandbox_child

_LAST = 300
"""Characters of its error that are kept of a program."""


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    """Of a file, and of all files together."""
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ended by itself, with exit code 0."""
    reason: str
    """Why it did not; empty where it did."""


def run(program: str, limits: Limits) -> Outcome:
    """Run Python source in a sandbox; what it prints is lost.

    Raises InputError where this system cannot isolate a process.
    """
    if sys.platform != "linux":
        raise InputError(f"generated code is run in Linux namespaces only, and this system is {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="megatron-moe-sandbox-") as folder:
        os.chmod(folder, 0o755)
        settings = {
            "folder": folder,
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "processes": limits.processes,
        }
        child = str(Path(sandbox_child.__file__))
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", child, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={},
                start_new_session=True,
            )
            try:
                process.communicate(program.encode(errors="surrogatepass"), timeout=limits.wall_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return Outcome(False, f"took more than {limits.wall_s:g} s")
            errors.seek(0, os.SEEK_END)
            errors.seek(max(0, errors.tell() - 4 * _LAST))
            said = errors.read().decode(errors="replace").strip()
    return _outcome(process.returncode, said)


def _outcome(exit_code: int, said: str) -> Outcome:
    if exit_code == sandbox_child.CANNOT_ISOLATE:
        raise InputError(
            f"generated code is not run here: this system does not let a process shut itself in ({said}); "
            "allow user namespaces, or run as root"
        )
    if exit_code == 0:
        return Outcome(True, "")
    last_line = said.splitlines()[-1][-_LAST:] if said else f"exit code {exit_code}"
    return Outcome(False, last_line)
