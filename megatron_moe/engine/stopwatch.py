"""What Megatron-Core does when: its schedules and finalizers name to `config.timers` what they begin and end.

On a host the times are those of its clock. On a device they are those of events in its stream, which nobody
waits for before the times are asked for. Seen with megatron-core 0.16.1 and 0.19.2; a test holds the names
against the installed version.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_moe.engine.timers import Timers

FORWARD, BACKWARD = "forward-compute", "backward-compute"
"""Names of a microbatch's passes through one model chunk; the loss is part of the forward pass."""
SCHEDULE = "forward-backward"
"""All of them, with what is sent between stages, and the reduction of gradients."""
GRADIENTS = (
    "all-grads-sync",
    "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)
"""What of the reduction of gradients follows the last backward pass."""
GATHER = "params-all-gather"
"""What the optimizer does with updated weights."""


@dataclass(frozen=True)
class Span:
    """Something that was done, by Megatron-Core's name for it; seconds since the stopwatch was made."""

    name: str
    begin_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.begin_s


class Stopwatch(Timers):
    """Takes the place of Megatron-Core's timers for a while.

    Args:
        device: whose times are measured.
        on_end: called with the name of everything that ends.

    Attributes:
        made_s: when it was made, by `time.perf_counter`, which all processes of a machine share.
    """

    def __init__(self, device: torch.device, on_end: Callable[[str], None] | None = None) -> None:
        self.made_s = time.perf_counter()
        self._clock: Clock = DeviceClock() if device.type == "cuda" else HostClock()
        self._on_end = on_end
        self._begun: dict[str, Any] = {}
        self._measured: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure what happens meanwhile, under a name of the caller's."""
        self.begin(name)
        yield
        self.end(name)

    def begin(self, name: str) -> None:
        self._begun[name] = self._clock.now()

    def end(self, name: str) -> None:
        self._measured.append((name, self._begun.pop(name), self._clock.now()))
        if self._on_end is not None:
            self._on_end(name)

    def spans(self) -> list[Span]:
        """Everything that was measured, by its end. Waits for the device."""
        seconds = self._clock.seconds
        return [Span(name, seconds(begin), seconds(end)) for name, begin, end in self._measured]

    def since_start(self, moment: Any) -> float:
        """Seconds from the making of the stopwatch to a moment of the same device: of the host's
        `time.perf_counter`, or an event."""
        return self._clock.seconds(moment)


class Clock(Protocol):
    """Moments, and the seconds between the clock's making and a moment."""

    def now(self) -> Any: ...

    def seconds(self, moment: Any) -> float: ...


class HostClock:
    def __init__(self) -> None:
        self.origin = self.now()

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, moment: float) -> float:
        return moment - self.origin


class DeviceClock:
    """Events in the stream of the day."""

    def __init__(self) -> None:
        self.origin = self.now()

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: torch.cuda.Event) -> float:
        """Waits for it."""
        moment.synchronize()
        return self.origin.elapsed_time(moment) / 1000
