"""Folders that conversions make: whole, or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_moe.config.errors import InputError, RunError, not_written
from megatron_moe.data.staging import staging

NOT_COMPANIONS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".incomplete"),
    *(".index.json", ".py", ".distcp"),
)
"""Ends of names of what is not carried along beside a model's weights: weights in other forms, programs."""


@contextlib.contextmanager
def made_aside(out: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder beside `out` to write into, for this process alone. It gets that name when all is written, and
    is removed where something fails, with what a killed process left.

    Args:
        needed_bytes: what will be written at least.

    Raises InputError where `out` is there already, cannot be made, or is being written by another process;
    RunError where the disk is full.
    """
    _check_free(out)
    try:
        with staging(out, wait=False) as aside:
            _check_free(out)  # another process may have made it meanwhile
            room = shutil.disk_usage(aside).free
            if room < needed_bytes:
                raise RunError(
                    f"{out}: needs {needed_bytes / 1e6:,.1f} MB, and {room / 1e6:,.1f} MB are free; make room"
                )
            ready = aside / "ready"
            ready.mkdir()
            yield ready
            os.rename(ready, out)
    except OSError as error:
        raise not_written(f"{out}: cannot be written", error) from error


def _check_free(out: Path) -> None:
    if os.path.lexists(out) or not out.name:
        raise InputError(f"{out}: is there already; name a folder that is not, or remove it")


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
