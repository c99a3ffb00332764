"""The hashes of input files, which each start of a run asks for: read anew only if a file may have
changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.data.inputs import file_sha256
from megatron_moe.data.packed import damage_named
from megatron_moe.data.staging import staging

_WORTH_NOTING_BYTES = 64 << 20
"""Less is hashed in no time."""
_SETTLED_NS = 2_000_000_000
"""A file that changed so lately may change again without another time of change."""


def hashes_of(files: Sequence[str], notes: Path) -> list[str]:
    """The SHA-256 of each file. InputError if one cannot be read.

    Of much text they are noted in the folder `notes`, and found there while name, size, inode and times of
    all files stay as they are.
    """
    before = [_identity(path) for path in files]
    if sum(size for _, size, *_ in before) < _WORTH_NOTING_BYTES:
        return [file_sha256(path) for path in files]
    name = hashlib.sha256(json.dumps(before).encode()).hexdigest()[:12]
    note = notes / f"inputs-{name}.json"
    if note.is_file():
        noted: list[str] = json.loads(note.read_text())
        return noted
    with staging(note, wait=True) as folder:
        if note.is_file():  # another process hashed them while this one waited
            noted = json.loads(note.read_text())
            return noted
        hashes = [file_sha256(path) for path in files]
        latest = max(time_ns for *_, modified, changed in before for time_ns in (modified, changed))
        if [_identity(path) for path in files] == before and time.time_ns() - latest > _SETTLED_NS:
            (folder / note.name).write_text(json.dumps(hashes))
            (folder / note.name).rename(note)
    return hashes


def _identity(path: str) -> tuple[str, int, int, int, int]:
    with damage_named(path):
        stat = os.stat(path)
    return os.path.realpath(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns
