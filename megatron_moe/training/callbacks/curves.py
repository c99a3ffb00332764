"""curves.png at the end of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.training.callback import Callback
from megatron_moe.training.terminal import first_line, say

if TYPE_CHECKING:
    from megatron_moe.training.trainer import Trainer

CURVES = "curves.png"


class Curves(Callback):
    """Draws metrics.jsonl of the whole run. For the rank that writes it, behind it."""

    def __init__(self, run_folder: Path, log: Path) -> None:
        self.run_folder = run_folder
        self.log = log

    def on_end(self, trainer: Trainer) -> None:
        # It has its say about font caches and folders that it cannot write to; neither matters here.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        try:
            from megatron_moe.training.curves import draw

            draw(self.run_folder / "metrics.jsonl", self.run_folder / CURVES, trainer.experiment.name)
        except Exception as error:
            # A picture is no reason to lose a run.
            say([f"logging.curves: {CURVES} could not be drawn ({first_line(error)})"], self.log)
