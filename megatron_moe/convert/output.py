"""Folders that conversions make: whole, or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_moe.config.errors import InputError, RunError, not_written

NOT_COMPANIONS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".incomplete"),
    *(".index.json", ".py", ".distcp"),
)
"""Ends of names of what is not carried along beside a model's weights: weights in other forms, programs."""


@contextlib.contextmanager
def made_aside(out: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder beside `out` to write into. It gets that name when all is written, and is removed where
    something fails.

    Args:
        needed_bytes: what will be written at least.

    Raises InputError where `out` is there already or cannot be made, RunError where the disk is full.
    """
    if os.path.lexists(out):
        raise InputError(f"{out}: is there already; name a folder that is not, or remove it")
    aside = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():  # a writer died
            shutil.rmtree(aside)
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes:
            raise RunError(
                f"{out}: needs {needed_bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; make room"
            )
        aside.mkdir()
        yield aside
        os.rename(aside, out)
    except OSError as error:
        raise not_written(f"{out}: cannot be written", error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_companions(source: Path, into: Path) -> None:
    """Copy what lies beside a model's weights as it is: config.json, tokenizer, licence."""
    into.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(NOT_COMPANIONS):
            shutil.copyfile(file, into / file.name)


def default_workers(size_bytes: int) -> int:
    """Processes that a conversion of so many bytes is worth: starting one takes seconds."""
    return max(1, min(len(os.sched_getaffinity(0)), 16, size_bytes // _BYTES_PER_WORKER))


_BYTES_PER_WORKER = 8 << 30
