"""Checkpoint folders on disk: complete or not there. No torch: the launcher looks here before any rank
starts.

`checkpoints/iter_0000020/` holds the files of Megatron-Core's dist_checkpointing, `resolved.yaml` and
`manifest.json`, which names every file with its size and SHA-256. A checkpoint is written aside, synced to
disk, given its manifest, renamed, and only then named by `checkpoints/latest`. So a folder of that name is
whole, whenever the writer died.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def folder_of(run_folder: Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` steps lies."""
    return run_folder / "checkpoints" / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The number of steps behind a checkpoint folder."""
    return int(checkpoint.name.removeprefix("iter_"))


def complete(run_folder: Path) -> list[Path]:
    """All checkpoints of a run whose files are there in full size, the oldest first."""
    folders = (run_folder / "checkpoints").glob("iter_*")
    return sorted((folder for folder in folders if _sizes_are_right(folder)), key=iteration_of)


def newest(run_folder: Path) -> Path | None:
    """The newest of `complete`."""
    return next(reversed(complete(run_folder)), None)


def begin(run_folder: Path, iteration: int) -> Path:
    """An empty folder aside in which to write the checkpoint; what a dead writer left is removed."""
    final = folder_of(run_folder, iteration)
    aside = final.with_name(f".{final.name}.part")
    for left in final.parent.glob(".iter_*.part"):
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, run_folder: Path, iteration: int, hashes: dict[str, str]) -> Path:
    """Make the checkpoint written to `aside` the newest one of the run.

    Args:
        hashes: SHA-256 of every file, by name.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "iteration": iteration,
        "files": {
            name: {"bytes": (aside / name).stat().st_size, "sha256": hashes[name]} for name in sorted(hashes)
        },
    }
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    final = folder_of(run_folder, iteration)
    if final.exists():  # of a run that was cut back; it must not be mistaken for the new one
        shutil.rmtree(final)
    os.rename(aside, final)
    _sync(final.parent)
    point_latest(final)
    return final


def point_latest(checkpoint: Path) -> None:
    """Let `latest` name a checkpoint."""
    latest = checkpoint.parent / "latest"
    aside = latest.with_name(".latest.part")
    aside.write_text(checkpoint.name + "\n")
    _sync(aside)
    os.replace(aside, latest)
    _sync(checkpoint.parent)


def keep_newest(run_folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for folder in complete(run_folder)[:-count]:
        # Without its manifest it is no checkpoint any more, even if removing the rest is cut short.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


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


def _sizes_are_right(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["format_version"] == FORMAT_VERSION and all(
            (folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
