"""SIGTERM: finish the step, save, and ask to be started again."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch.distributed as dist

from megatron_moe.training.callback import Callback
from megatron_moe.training.trainer import Trainer


class Termination(Callback):
    """Turns SIGTERM into `trainer.stop_requested`, on which all ranks agree at the end of the step."""

    def on_start(self, trainer: Trainer) -> None:
        owner = os.getpid()

        def request_stop(number: int, frame: FrameType | None) -> None:
            # A forked worker has our handler too, and is ended by SIGTERM as a matter of course.
            if os.getpid() != owner:
                os._exit(128 + number)
            trainer.stop_requested = True

        before = signal.signal(signal.SIGTERM, request_stop)
        try:
            dist.barrier()
        except Exception:
            # The signal found another rank still starting, which left with nothing to save: so do we.
            if trainer.stop_requested and callable(before):
                before(signal.SIGTERM, None)
            raise
