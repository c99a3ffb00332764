"""TensorBoard: event files in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.training.callbacks.sink import Sink, Values

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_S = 10
"""What a viewer lags behind, and what a killed run loses."""


class TensorBoard(Sink):
    """Scalars under the keys of metrics.jsonl, step = iteration.

    TensorBoard keeps them in float32. A text, such as `skipped`, becomes 1: its readers drop no texts of the
    steps that are replaced.
    """

    key = "logging.tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def open(self, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers then drop what a run that was cut back to `iteration` had written behind it.
        self.writer = SummaryWriter(str(self.folder), purge_step=iteration + 1, flush_secs=_FLUSH_S)

    def write(self, values: Values) -> None:
        assert self.writer is not None
        step = int(values["iteration"])
        for key, value in values.items():
            if key != "iteration":
                self.writer.add_scalar(key, 1.0 if isinstance(value, str) else value, step)

    def close(self, completed: bool) -> None:
        assert self.writer is not None
        self.writer.close()
