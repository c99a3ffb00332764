"""Checkpoint folders on disk: complete or not there. No torch: the launcher looks here before any rank
starts.

`checkpoints/iter_0000020/` holds the files of Megatron-Core's dist_checkpointing, `resolved.yaml`,
`about.json` and `manifest.json`, which names every file with its size and SHA-256. A checkpoint is written
aside, synced to disk, given its manifest, renamed, and only then named by `checkpoints/latest`. So a folder
of that name is whole, whenever the writer died; one that is not was damaged later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"iter_(\d{7,})")


def folder_of(run_folder: Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` steps lies."""
    return run_folder / "checkpoints" / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The number of steps behind a checkpoint folder."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def all_of(run_folder: Path) -> list[Path]:
    """Every checkpoint folder of a run, whole or damaged, the oldest first."""
    folders = (path for path in (run_folder / "checkpoints").glob("iter_*") if _NAME.fullmatch(path.name))
    return sorted(folders, key=iteration_of)


def complete(run_folder: Path) -> list[Path]:
    """All checkpoints of a run whose files are there in full size, the oldest first."""
    return [folder for folder in all_of(run_folder) if fault(folder) is None]


def newest(run_folder: Path) -> Path | None:
    """The newest of `complete`."""
    return next(reversed(complete(run_folder)), None)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint as far as can be seen without reading its tensors; None if nothing
    is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
        if version != FORMAT_VERSION:
            return f"format version {version}, but this program reads {FORMAT_VERSION}"
        for name, entry in files.items():
            size = (checkpoint / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} of {entry['bytes']:,} bytes"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not what was written"
    return None


def begin(run_folder: Path, iteration: int) -> Path:
    """An empty folder aside in which to write the checkpoint; what a dead writer left is removed."""
    aside = _aside(folder_of(run_folder, iteration))
    for left in aside.parent.glob(".iter_*.part"):
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, run_folder: Path, iteration: int, hashes: dict[str, str]) -> Path:
    """Make the checkpoint written to `aside` the newest one of the run.

    Args:
        hashes: SHA-256 of every file, by name.
    """
    seal(aside, iteration, hashes)
    final = folder_of(run_folder, iteration)
    os.rename(aside, final)
    _sync(final.parent)
    point_latest(final)
    return final


def seal(aside: Path, iteration: int, hashes: dict[str, str]) -> None:
    """Give a folder its manifest, and see to it that all of it is on the disk. `hashes`: SHA-256 by name; a
    name may have folders in it."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "iteration": iteration,
        "files": {
            name: {"bytes": (aside / name).stat().st_size, "sha256": hashes[name]} for name in sorted(hashes)
        },
    }
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*aside.rglob("*"), aside):
        _sync(path)


def point_latest(checkpoint: Path) -> None:
    """Let `latest` name a checkpoint."""
    latest = checkpoint.parent / "latest"
    line = checkpoint.name + "\n"
    if latest.exists() and latest.read_text(errors="replace") == line:
        return
    aside = latest.with_name(".latest.part")
    aside.write_text(line)
    _sync(aside)
    os.replace(aside, latest)
    _sync(checkpoint.parent)


def keep_newest(run_folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for folder in complete(run_folder)[:-count]:
        # Under that name it is no checkpoint any more, even if removing the rest is cut short.
        aside = _aside(folder)
        os.rename(folder, aside)
        shutil.rmtree(aside)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that the run can write that one again. Returns where it lies now."""
    place = checkpoint.with_name(f"damaged_{checkpoint.name}")
    if place.exists():
        shutil.rmtree(place)
    os.rename(checkpoint, place)
    return place


def files_of(checkpoint: Path) -> dict[str, str]:
    """Name and SHA-256 of each file of a complete checkpoint, as its manifest says."""
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def damaged(checkpoint: Path, names: Iterable[str]) -> list[str]:
    """Those of the files whose bytes are not the ones that were saved."""
    expected = files_of(checkpoint)
    return [name for name in names if sha256(checkpoint / name) != expected[name]]


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
