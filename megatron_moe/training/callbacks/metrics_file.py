"""metrics.jsonl: one JSON object a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.terminal import say

if TYPE_CHECKING:
    from megatron_moe.training.trainer import Trainer


class MetricsFile(Callback):
    """Appends each step's record, flushed at once; written by one rank."""

    def __init__(self, path: Path, log: Path) -> None:
        self.path = path
        self.log = log
        self.file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        last = cut_back(self.path, trainer.iteration)
        if last < trainer.iteration:
            say([_lost(last + 1, trainer.iteration)], self.log)
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


def cut_back(path: Path, iteration: int) -> int:
    """Remove every line behind `iteration`, and all from the first one on that cannot be read, so that a
    resumed run writes each step once. Returns the last step that is left."""
    if not path.exists():
        return 0
    keep = last = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)["iteration"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                step = None
            if not isinstance(step, int) or step > iteration:
                break
            keep += len(line)
            last = step
    with path.open("r+b") as file:
        file.truncate(keep)
    return last


def _lost(first: int, last: int) -> str:
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"metrics.jsonl: no readable record of {steps}; it goes on at step {last + 1}"
