"""SIGTERM: finish the step, save, and ask to be started again."""

from __future__ import annotations

import signal
from types import FrameType

from megatron_moe.training.callback import Callback
from megatron_moe.training.trainer import Trainer


class Termination(Callback):
    """Turns SIGTERM into `trainer.stop_requested`, on which all ranks agree at the end of the step."""

    def on_start(self, trainer: Trainer) -> None:
        def request_stop(number: int, frame: FrameType | None) -> None:
            trainer.stop_requested = True

        signal.signal(signal.SIGTERM, request_stop)
