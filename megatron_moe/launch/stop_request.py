"""Ctrl-C and termination signals, while something runs that has to be ended in order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from megatron_moe.launch import exit_codes

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A termination signal or Ctrl-C came."""


class StopRequest:
    """Inside `with`, a signal sets `requested` instead of ending us; a second Ctrl-C sets `insisted`."""

    def __init__(self, message: str) -> None:
        """`message` goes to stderr with the first signal, if it is not empty."""
        self.requested = False
        self.insisted = False
        self._message = message
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            # What was started to outlive its terminal (nohup) goes on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.insisted = self.insisted or number == signal.SIGINT
        elif self._message:
            # A terminal's line holds the progress bar, or the echoed ^C.
            print("\n" * sys.stderr.isatty() + self._message, file=sys.stderr, flush=True)
        self.requested = True


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, each of the signals raises `Stopped`, so that what was begun is cleaned up on the way out."""
    owner = os.getpid()
    came = False

    def raise_stopped(number: int, frame: FrameType | None) -> None:
        nonlocal came
        # A forked worker has our handlers too, and is ended by SIGTERM as a matter of course.
        if os.getpid() != owner:
            os._exit(128 + number)
        came = True
        raise Stopped

    before: dict[int, Any] = {
        number: signal.signal(number, raise_stopped)
        for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    except Exception:
        # A library's C++ part that called back into Python (sentencepiece) makes an error of its own of it.
        if came:
            raise Stopped from None
        raise
    finally:
        _restore(before)


def exit_on_sigterm(before: Callable[[], None] = lambda: None) -> None:
    """From here on SIGTERM runs `before` and ends this process with 75: a rank that has nothing to save."""
    owner = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            before()
        # Not by an exception: in the middle of an import a library may turn it into another one.
        os._exit(exit_codes.START_AGAIN)

    signal.signal(signal.SIGTERM, leave)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
