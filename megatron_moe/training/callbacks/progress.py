"""What the user sees while it trains, and log.txt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.trainer import Trainer


class ProgressBar(Callback):
    """A bar with loss, tokens a second and time left on a terminal; elsewhere, and in log.txt, a line every
    `logging.detail_interval` steps. For one rank."""

    def __init__(self, log: Path) -> None:
        self.log_path = log
        self.log: IO[str] | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.eval_loss: float | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.log = self.log_path.open("a", encoding="utf-8")
        if not sys.stdout.isatty():
            return
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stdout),
            expand=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(
            "training",
            total=trainer.experiment.training.train_iters,
            completed=trainer.iteration,
            numbers="",
        )

    def on_step(self, trainer: Trainer, record: Record) -> None:
        self.eval_loss = record.get("eval/loss", self.eval_loss)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=trainer.iteration, numbers=self._numbers(record))
        is_last = trainer.iteration == trainer.experiment.training.train_iters
        if (
            is_last
            or trainer.iteration == 1
            or trainer.iteration % trainer.experiment.logging.detail_interval == 0
        ):
            self._line(trainer, record)

    def on_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.stop()
        assert self.log is not None
        self.log.close()

    def _line(self, trainer: Trainer, record: Record) -> None:
        width = len(str(trainer.experiment.training.train_iters))
        line = (
            f"step {record['iteration']:>{width}}/{trainer.experiment.training.train_iters}  "
            f"{self._numbers(record)}  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.3f}"
        )
        if "skipped" in record:
            line += f"  skipped: {record['skipped']}"
        assert self.log is not None
        print(line, file=self.log, flush=True)
        if self.bar is None:
            print(line, flush=True)

    def _numbers(self, record: Record) -> str:
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        held_out = "" if self.eval_loss is None else f"  held-out {self.eval_loss:.4f}"
        return f"loss {loss}{held_out}  {record['tokens_per_second']:,.0f} tokens/s"
