"""Files that a command writes where the user says: whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from megatron_moe.config.errors import InputError, not_written


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
