"""A collective under way, and how long it took: in all, and for whoever waited for it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Protocol

import torch


class Transfer:
    """A collective under way.

    Args:
        work: the collective.
        measured: how long it takes, where that is asked for.
    """

    def __init__(self, work: Any, measured: _Measured | None = None) -> None:
        self._work, self._measured = work, measured
        if measured is not None:
            measured.launched(work)

    def wait(self) -> None:
        """Until it is done; on a device: let what follows wait for it."""
        if self._measured is None:
            self._work.wait()
        else:
            self._measured.wait(self._work)


class TransferTimes:
    """What the transfers of a layer take.

    Collectives on a host are measured there. Those on a device are measured by events in its streams, which
    nobody waits for before the times are taken.

    Attributes:
        on: whether the transfers that are launched from now on are measured.
    """

    def __init__(self) -> None:
        self.on = False
        self._measured: list[_Measured] = []

    def launch(self, collective: Callable[[], Any], device: torch.device) -> Transfer:
        """Args:
        collective: launches it, and gives the work under way.
        device: of the tensors.
        """
        if not self.on:
            return Transfer(collective())
        self._measured.append(_OnDevice(self._clock) if device.type == "cuda" else _OnHost())
        return Transfer(collective(), self._measured[-1])

    def take(self) -> tuple[float, float]:
        """Seconds during which any transfer was under way, and seconds that were spent waiting for one.

        Starts anew. Waits for the device.
        """
        measured, self._measured = self._measured, []
        return _length_of_union(one.under_way() for one in measured), sum(one.waited() for one in measured)

    def waits(self) -> list[tuple[Any, Any]]:
        """Begin and end of each wait since the last `take`: on a host by `time.perf_counter`, else events."""
        return [(one.wait_began, one.wait_ended) for one in self._measured]

    @cached_property
    def _clock(self) -> _DeviceClock:
        return _DeviceClock()


class _Measured(Protocol):
    """The times of one transfer, from its making on; in seconds."""

    wait_began: Any
    wait_ended: Any

    def launched(self, work: Any) -> None: ...

    def wait(self, work: Any) -> None: ...

    def under_way(self) -> tuple[float, float]: ...

    def waited(self) -> float: ...


class _OnHost:
    def __init__(self) -> None:
        self.began, self.done = 0.0, math.inf
        self.wait_began = self.wait_ended = 0.0

    def launched(self, work: Any) -> None:
        self.began = time.perf_counter()
        # Gloo's reduce-scatter has no future: it counts as under way until somebody waited for it.
        with contextlib.suppress(RuntimeError):
            work.get_future().add_done_callback(self._finish)

    def _finish(self, future: Any) -> None:
        self.done = time.perf_counter()

    def wait(self, work: Any) -> None:
        self.wait_began = time.perf_counter()
        work.wait()
        self.wait_ended = time.perf_counter()

    def under_way(self) -> tuple[float, float]:
        # Whoever waited for it got to know of the end a little later.
        return self.began, self.wait_ended if self.done > self.wait_began else self.done

    def waited(self) -> float:
        return self.wait_ended - self.wait_began


class _DeviceClock:
    """Times of events of a device, since an event before them."""

    def __init__(self) -> None:
        self.origin = self.event()
        # Nothing but the transfers themselves delays this stream.
        self.stream = torch.cuda.Stream()

    def event(self) -> torch.cuda.Event:
        """Here in the stream of today."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, event: torch.cuda.Event) -> float:
        """Waits for it."""
        event.synchronize()
        return self.origin.elapsed_time(event) / 1000


class _OnDevice:
    def __init__(self, clock: _DeviceClock) -> None:
        self.clock, self.began = clock, clock.event()
        self.done = self.wait_began = self.wait_ended = self.began

    def launched(self, work: Any) -> None:
        with torch.cuda.stream(self.clock.stream):
            work.wait()
            self.done = self.clock.event()

    def wait(self, work: Any) -> None:
        self.wait_began = self.clock.event()
        work.wait()
        self.wait_ended = self.clock.event()

    def under_way(self) -> tuple[float, float]:
        return self.clock.seconds(self.began), self.clock.seconds(self.done)

    def waited(self) -> float:
        return self.clock.seconds(self.wait_ended) - self.clock.seconds(self.wait_began)


def _length_of_union(intervals: Iterable[tuple[float, float]]) -> float:
    total, covered = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, covered))
        covered = max(covered, end)
    return total
