"""Write aside, then move: a folder beside the target that one process at a time owns, and that a killed one
cannot litter."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_moe.config.errors import InputError, is_outside, not_written

_LOCK = "lock"


@contextlib.contextmanager
def staging(target: Path, wait: bool) -> Iterator[Path]:
    """An empty folder on the same disk as `target`, for this process alone until the block ends; then it is
    removed.

    What a killed predecessor left there goes first. If the block raises, folders that were made for `target`
    go too. `wait`: wait while another process has it; otherwise that is an InputError. InputError also if
    nothing can be written there, RunError on a full disk.
    """
    folder = target.with_name(f".{target.name}.partial")
    made = _missing_parents(target.parent)
    try:
        lock = _acquire(folder, wait, target)
    except OSError as error:
        _remove_empty([folder, *made])
        raise not_written(f"{target.parent}: cannot write there", error) from None
    try:
        _clear(folder)
        yield folder
    except BaseException as error:
        _release(folder, lock)
        _remove_empty(made)
        if isinstance(error, OSError) and is_outside(error):
            raise not_written(f"{target}: cannot be written", error) from None
        raise
    _release(folder, lock)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _acquire(folder: Path, wait: bool, target: Path) -> int:
    """The descriptor of the locked file. Its owner removes it, so it counts only if it still is what the name
    stands for."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == os.stat(folder / _LOCK).st_ino:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise InputError(
                    f"{target}: another process is writing it right now; wait for it or choose another name"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _release(folder: Path, descriptor: int) -> None:
    _clear(folder)
    (folder / _LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the next owner is already in it
        folder.rmdir()
    os.close(descriptor)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


def _missing_parents(folder: Path) -> list[Path]:
    """Those of `folder` and its parents that do not exist, the innermost first."""
    missing = []
    while not folder.exists() and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
