"""What tests of sinks share: feeding one as a run does, and reading back what wandb keeps offline."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_moe.training.callbacks.sink import Feed, Sink

BLOCK = 32768


def feed(
    sink: Sink,
    log: Path,
    records: list[dict[str, Any]],
    done: int = 0,
    error: bool = False,
    pause_s: float = 0.0,
) -> float:
    """One start of a run with `done` steps behind it. Returns the seconds that its end took."""
    callback, trainer = Feed(sink, log), SimpleNamespace(iteration=done)
    callback.on_start(trainer)
    for record in records:
        callback.on_step(trainer, record)
        time.sleep(pause_s)
    started = time.monotonic()
    (callback.on_error if error else callback.on_end)(trainer)
    return time.monotonic() - started


def offline_steps(run_folder: Path) -> list[list[dict[str, Any]]]:
    """The steps in each of wandb's offline files of a run, oldest file first; without wandb's own keys."""
    files = sorted(run_folder.glob("wandb/offline-run-*/*.wandb"))
    return [[step for step in _steps(path) if "iteration" in step] for path in files]


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record

    for content in _entries(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            yield {key: value for key, value in items.items() if key == "_step" or not key.startswith("_")}


def _entries(data: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log, which wandb's files are behind a header of 7 bytes."""
    at, entry = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""
