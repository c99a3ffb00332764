"""metrics.jsonl: one JSON object a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.trainer import Trainer


class MetricsFile(Callback):
    """Appends each step's record, flushed at once; written by one rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        cut_back(self.path, trainer.iteration)
        self.file = self.path.open("a", encoding="utf-8")

    def on_step(self, trainer: Trainer, record: Record) -> None:
        assert self.file is not None
        self.file.write(json.dumps(without_nan(record), allow_nan=False) + "\n")
        self.file.flush()

    def on_end(self, trainer: Trainer) -> None:
        assert self.file is not None
        self.file.close()


def without_nan(value: Any) -> Any:
    """`value` with None for each number that is not finite: JSON has no word for those."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    return value


def cut_back(path: Path, iteration: int) -> None:
    """Remove every line behind `iteration`, and a torn last one, so that a resumed run writes each step
    once."""
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as file:
        for line in file:
            try:
                is_kept = line.endswith(b"\n") and json.loads(line)["iteration"] <= iteration
            except (ValueError, KeyError, TypeError):
                is_kept = False
            if not is_kept:
                break
            keep += len(line)
    with path.open("r+b") as file:
        file.truncate(keep)
