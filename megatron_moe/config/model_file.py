"""The file of a tokenizer, as bytes."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_moe.config.errors import InputError

MOST_IDS = 10_000_000
"""Far above any tokenizer. A larger id is a mistake, which would fill the memory."""


def read_model(path: str | Path, what: str) -> bytes:
    """The bytes of a tokenizer's file. InputError if it cannot be read; `what`: such as "the sentencepiece
    model"."""
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name the file of {what} in it{_likely(path)}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read {what}: {error.strerror}") from None


def _likely(folder: str | Path) -> str:
    """A file of the folder that the user probably means."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".model", ".tiktoken"))
    return f", for example {files[0]}" if files else ""
