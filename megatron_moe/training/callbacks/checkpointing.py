"""Saving: every `checkpoint.save_interval` steps, and at the end, however the run ends."""

from __future__ import annotations

from megatron_moe.training import checkpoint
from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.trainer import Trainer


class Checkpointing(Callback):
    """Saves a checkpoint; see `training.checkpoint`."""

    def __init__(self) -> None:
        self.saved_at: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.saved_at = trainer.iteration or None

    def on_step(self, trainer: Trainer, record: Record) -> None:
        interval = trainer.experiment.checkpoint.save_interval
        if interval is not None and trainer.iteration % interval == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.saved_at != trainer.iteration and trainer.iteration > 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        checkpoint.save(trainer)
        self.saved_at = trainer.iteration
