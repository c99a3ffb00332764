"""Folders under a run root that are made once, and found again by what they were made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.text_files import suffix_of
from megatron_moe.data.input_hashes import hashes_of
from megatron_moe.data.staging import staging, sync_folder


@contextlib.contextmanager
def naming(key: str, hint: str = "") -> Iterator[None]:
    """Put the key of the YAML in front of each problem, and `hint` behind it."""
    try:
        yield
    except InputError as error:
        raise InputError(*(f"{key}: {problem}{hint}" for problem in error.problems)) from None


def input_hashes(files: Sequence[str], key: str, made_here: Path) -> list[tuple[str, str]]:
    """Type and hash of each file: their names don't matter, as files may move."""
    with naming(key):
        return list(zip(map(suffix_of, files), hashes_of(files, made_here), strict=True))


def named(name: str, content: Mapping[str, Any]) -> str:
    """A name that says what a folder holds, and everything that the content depends on, as a hash."""
    return f"{name}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"


def corpus_name(entry: str) -> str:
    """A name for folders, from the first entry of a list of inputs."""
    name = Path(entry).name
    name = name.removesuffix(name[len(name) - len(suffix_of(name)) :])
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_") or "corpus"


@contextlib.contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """Hands out an empty folder that becomes `folder` when the block ends; None if it is there already."""
    if folder.is_dir():
        yield None
        return
    with staging(folder, wait=True) as aside:
        if folder.is_dir():  # another process made it while this one waited
            yield None
            return
        ready = aside / "ready"
        ready.mkdir()
        yield ready
        ready.rename(folder)
        sync_folder(folder.parent)
