"""Where a run's numbers go beside metrics.jsonl: a sink, and what feeds it."""

from __future__ import annotations

import queue
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.callbacks.metrics_file import without_nan
from megatron_moe.training.terminal import first_line, say

if TYPE_CHECKING:
    from megatron_moe.training.trainer import Trainer

Values = dict[str, float | str]
"""What a sink takes of a step: no null, no NaN, no list."""

_WAITING = 10_000
"""Steps that may wait for a sink. One that falls back further is given up."""
_AFTER_AN_ERROR_S = 3.0


class SinkError(Exception):
    """A sink cannot go on: one line that says why, and what to do."""


class Sink:
    """Another place for the numbers of metrics.jsonl.

    `open`, `write` and `close` are called in this order, in a thread beside the training: they may wait.
    Whatever they raise is said once and ends the sink, never the training.
    """

    key: ClassVar[str]
    """The key that switches it on; names it to the user."""
    patience_s: float = 10.0
    """What the end of a run waits for the sink at most."""
    news: str | None = None
    """Set by the sink to what the user should hear once, such as an address."""

    def open(self, iteration: int) -> None:
        """Get ready for the steps behind `iteration`; what is there of them already is to be replaced."""

    def write(self, values: Values) -> None:
        """Take a step; `values["iteration"]` is its number."""

    def close(self, completed: bool) -> None:
        """Finish. `completed`: the run did not end with an error."""

    def abandon(self) -> str:
        """Called instead of waiting any longer. Returns what the user should know, or do."""
        return "it did not end; what it lacks is in metrics.jsonl"


class Feed(Callback):
    """Hands each step to a sink, without waiting for it. For the rank that writes metrics.jsonl, behind that:
    a sink never sees a step which the file lacks."""

    def __init__(self, sink: Sink, log: Path) -> None:
        self.sink = sink
        self.log = log
        self.records: queue.Queue[Record | bool] = queue.Queue(_WAITING)
        self.trouble: str | None = None
        self.said = False
        self.thread = threading.Thread(target=self._feed, name=sink.key, daemon=True)
        self.iteration = 0

    def on_start(self, trainer: Trainer) -> None:
        self.iteration = trainer.iteration
        self.thread.start()

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if self.trouble is None:
            try:
                self.records.put_nowait(record)
            except queue.Full:
                self.trouble = f"it is {_WAITING:,} steps behind"
        self._pass_on_news()
        if self.trouble is not None:
            self._say_once(f"{self.trouble}. Training goes on without it.")

    def on_end(self, trainer: Trainer) -> None:
        self._finish(completed=True, patience_s=self.sink.patience_s)

    def on_error(self, trainer: Trainer) -> None:
        self._finish(completed=False, patience_s=min(_AFTER_AN_ERROR_S, self.sink.patience_s))

    def _finish(self, completed: bool, patience_s: float) -> None:
        if self.thread.is_alive() and self.trouble is None:
            try:
                self.records.put_nowait(completed)
            except queue.Full:
                self.trouble = f"it is {_WAITING:,} steps behind"
            else:
                self.thread.join(patience_s)
        self._pass_on_news()
        if self.thread.is_alive():
            self._say_once(f"{self.sink.abandon()}.")
        elif self.trouble is not None:
            self._say_once(f"{self.trouble}.")

    def _pass_on_news(self) -> None:
        if self.sink.news is not None:
            say([f"{self.sink.key}: {self.sink.news}"], self.log)
            self.sink.news = None

    def _say_once(self, text: str) -> None:
        if not self.said:
            self.said = True
            say([f"{self.sink.key}: {text}"], self.log)

    def _feed(self) -> None:
        """The thread of the sink."""
        # Signals are the main thread's; what the sink starts inherits that, and ends with us, not before.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            self.sink.open(self.iteration)
            while not isinstance(record := self.records.get(), bool):
                self.sink.write(values(record))
            self.sink.close(completed=record)
        except SinkError as error:
            self.trouble = str(error)
        except Exception as error:
            self.trouble = first_line(error)


def values(record: Record) -> Values:
    """A step's record as single numbers and texts: a list with an entry a layer becomes `<key>/<layer>`,
    layers counted from 0; what is null or not finite is left out."""
    flat: Values = {}
    for key, value in without_nan(record).items():
        entries = (
            {f"{key}/{n}": entry for n, entry in enumerate(value)}
            if isinstance(value, list)
            else {key: value}
        )
        flat |= {name: entry for name, entry in entries.items() if entry is not None}
    return flat
