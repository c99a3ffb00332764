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
    """A bar with loss, tokens a second and time left on a terminal; elsewhere, and in log.txt, a line for the
    first step, for every `logging.detail_interval`-th, for the last, and for each that was evaluated or
    skipped. For one rank.
    """

    def __init__(self, log: Path) -> None:
        self.log_path = log
        self.log: IO[str] | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.lines = 0
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
            console=_Console(file=sys.stdout),
            expand=True,
            # Drawing takes some 0.7 ms of rank 0, whom the others wait for; rich does it ten times a second.
            refresh_per_second=4,
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
            self.bar.update(
                self.task,
                completed=trainer.iteration,
                numbers=_numbers(record | {"eval/loss": self.eval_loss}),
            )
        is_regular = trainer.iteration % trainer.experiment.logging.detail_interval == 0
        is_last = trainer.stopped or trainer.iteration == trainer.experiment.training.train_iters
        if self.lines == 0 or is_regular or is_last or "eval/loss" in record or "skipped" in record:
            self._line(trainer, record)

    def on_end(self, trainer: Trainer) -> None:
        self._close()

    def on_error(self, trainer: Trainer) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.log is not None:
            self.log.close()

    def _line(self, trainer: Trainer, record: Record) -> None:
        wanted = trainer.experiment.training.train_iters
        line = (
            f"step {record['iteration']:>{len(str(wanted))}}/{wanted}  "
            f"{_numbers(record)}  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.3f}"
        )
        if "global_batch_size" in record:
            line += f"  batch {record['global_batch_size']}"
        if record.get("moe/load_max_over_mean") is not None:
            line += f"  {_routing(record)}"
        if "moe/shadowed_experts" in record:
            line += f"  copied experts {record['moe/shadowed_experts']:.2f}"
        if record.get("moe/communication_ms"):
            line += f"  {_exchange(record)}"
        if "skipped" in record:
            line += f"  skipped: {record['skipped']}"
        assert self.log is not None
        print(line, file=self.log, flush=True)
        if self.bar is None:
            print(line, flush=True)
        self.lines += 1


class _Console(Console):
    """Leaves the cursor visible: a rank that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def _numbers(record: Record) -> str:
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    held_out = record.get("eval/loss")
    held_out_text = "" if held_out is None else f"  held-out {held_out:.4f}"
    return f"loss {loss}{held_out_text}  {record['tokens_per_second']:,.0f} tokens/s"


def _routing(record: Record) -> str:
    """What the routers did: the busiest expert's load, and what went wrong, if anything did."""
    text = f"load max/mean {record['moe/load_max_over_mean']:.2f}"
    if record["moe/drop_rate"]:
        text += f"  dropped {record['moe/drop_rate']:.1%}"
    if record["moe/dead_experts"]:
        text += f"  dead experts {record['moe/dead_experts']}"
    return text


def _exchange(record: Record) -> str:
    """How long tokens travelled in this step, and how much of that was hidden."""
    under_way, exposed = record["moe/communication_ms"], record["moe/exposed_communication_ms"]
    if exposed == under_way:
        return f"exchange {under_way:,.0f} ms, none hidden"
    hidden = max(0.0, 1 - exposed / under_way)
    return f"exchange {under_way:,.0f} ms, {hidden:.0%} hidden, {exposed:,.0f} ms exposed"
