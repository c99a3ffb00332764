"""The folder of a run: what lies where, and who may write to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moe.config.errors import InputError, RunError, is_outside
from megatron_moe.launch import lock


@dataclass(frozen=True)
class RunFolder:
    """`<logging.root>/<name>`."""

    path: Path

    @property
    def config(self) -> Path:
        """The user's own text."""
        return self.path / "config.yaml"

    @property
    def resolved(self) -> Path:
        """Every key with its value."""
        return self.path / "resolved.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def logs(self) -> Path:
        """What ranks and libraries wrote that is not for the terminal."""
        return self.path / "logs"

    @property
    def requeue(self) -> Path:
        """There while the last job ended with 75: torchrun turns that exit code into 1."""
        return self.path / "requeue"

    def ask_for_requeue(self) -> None:
        """Say that the run is to be started again."""
        self.requeue.touch()

    def write(self, config: str, resolved: str, plan: str) -> None:
        """Write the three files, each whole or not at all. Raises InputError where they cannot be written,
        RunError where the disk is full."""
        texts = {self.config: config, self.resolved: resolved, self.plan: plan}
        asides = {path: path.with_name(path.name + ".part") for path in texts}
        try:
            for path, text in texts.items():
                asides[path].write_text(text, encoding="utf-8")
            for path, aside in asides.items():
                os.replace(aside, path)
        except OSError as error:
            for aside in asides.values():
                aside.unlink(missing_ok=True)
            raise _cannot_write(self.path.parent, self.path, error) from error


@dataclass
class LockedRunFolder:
    """A run folder that is ours until the last process that holds `descriptor` has closed it."""

    folder: RunFolder
    descriptor: int
    _made: list[Path] = field(default_factory=list)

    def release(self) -> None:
        """Give the folder back."""
        os.close(self.descriptor)

    def discard(self) -> None:
        """Give the folder back, and remove what `open_locked` made as far as it is still empty."""
        if self._made:
            (self.folder.path / _LOCK).unlink()
            _remove_empty(self._made)
        os.close(self.descriptor)


_LOCK = ".lock"


def open_locked(root: str, name: str) -> LockedRunFolder:
    """Make the run folder where it is missing, and lock it.

    Raises InputError where it cannot be made or written, or another job holds it; RunError where the disk is
    full.
    """
    path = Path(root) / name
    missing: list[Path] = []
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        descriptor = lock.acquire(path / _LOCK)
    except OSError as error:
        _remove_empty(missing)
        raise _cannot_write(root, path, error) from error
    return LockedRunFolder(RunFolder(path), descriptor, missing)


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


def _cannot_write(root: str | Path, path: Path, error: OSError) -> InputError | RunError:
    if is_outside(error):
        return RunError(f"cannot write to the run folder {path}: {error.strerror}; make room and start again")
    return InputError(
        f"logging.root: {root}: cannot write to the run folder {path} ({error.strerror}): "
        "choose a folder that you can write to, e.g. logging.root=/tmp/runs"
    )
