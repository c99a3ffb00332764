"""Find a Python of a wanted version that works, wherever this machine keeps it. Runs on python3 >= 3.8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROBE = """
import importlib.util, json, os, sys, sysconfig, venv
print(json.dumps([
    os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
    sys.version.split()[0], sysconfig.get_platform(),
    importlib.util.find_spec("ensurepip") is not None, importlib.util.find_spec("pip") is not None,
]))
"""


class Interpreter(NamedTuple):
    """A Python that was started and answered; below a virtual environment, the one that made it."""

    path: str
    version: str
    platform: str
    has_ensurepip: bool
    has_pip: bool

    @property
    def minor(self) -> str:
        """The version as pip and folders name it: "3.11"."""
        return ".".join(self.version.split(".")[:2])


def probe(candidate: str) -> Interpreter | None:
    """Start `candidate`; None if it fails: pyenv has a shim also for the versions that are switched off."""
    command = [candidate, "-c", PROBE]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found = Interpreter(*json.loads(answer.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None
    return found if found.has_ensurepip or found.has_pip else None


def candidates(version: str) -> Iterator[str]:
    """Paths that may be a Python `version` ("3.11"), the likeliest first."""
    if sys.version.startswith(version + "."):
        # Not a virtual environment's own: the one that is about to be replaced may be the active one.
        yield getattr(sys, "_base_executable", sys.executable)
    for name in ("python" + version, "python3", "python"):
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            path = os.path.join(folder, name)
            if folder and os.access(path, os.X_OK):
                yield path
    pyenv = Path(os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv"))
    yield from sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python3")), reverse=True)


def find_python(version: str) -> Interpreter | None:
    """The first candidate that runs, is this version and can make environments with pip in them."""
    for candidate in dict.fromkeys(candidates(version)):
        found = probe(candidate)
        if found is not None and found.minor == version:
            return found
    return None
