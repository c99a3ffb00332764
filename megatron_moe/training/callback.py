"""The protocol of everything that happens around the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_moe.training.trainer import Trainer

Record = dict[str, Any]
"""One step's line of metrics.jsonl; a callback may add keys for those that come after it."""


class Callback:
    """Base with nothing to do. All ranks call all callbacks, in the same order, so that they may
    communicate."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step; `trainer.iteration` steps are already done."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """After a step; `trainer.iteration` counts it."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, also where a signal stopped the run; not after an error."""

    def on_error(self, trainer: Trainer) -> None:
        """After an exception, which goes on from here. Other ranks may be gone: no communication."""
