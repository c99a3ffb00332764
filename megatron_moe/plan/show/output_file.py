"""Files that a command writes where the user says: whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from megatron_moe.config.errors import InputError, not_written
from megatron_moe.config.extends import files_of


def check_output(option: str, path: Path, config: Path, *, makes_folder: bool = False) -> None:
    """Raise InputError where a file cannot be written there, before anything is computed for it, and where it
    would take the place of the experiment or of a file that this extends.

    Args:
        makes_folder: whether a folder that is missing will be made.
    """
    if any(os.path.realpath(path) == os.path.realpath(file) for file in files_of(str(config))):
        raise InputError(f"{option} {path} is the experiment, or a file that it extends: name another file")
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder: name a file in it")
    folder = Path(os.path.abspath(path)).parent
    while makes_folder and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{option} {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path} cannot be written: there is no permission to write to {folder}")


def write_whole(option: str, path: Path, content: bytes) -> None:
    """Write a file. Raises InputError or RunError, which name the option, where it cannot be written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder: name a file in it") from None
        if not path.parent.is_dir():
            raise InputError(f"{option} {path}: there is no folder {path.parent}") from None
        raise not_written(f"{option} {path} cannot be written", error) from None
