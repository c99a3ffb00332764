"""What stands in the place of Megatron-Core's timers: its own extension point, by which its schedules and
optimizers say when something begins and ends."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class Timers(ABC):
    """Is told by Megatron-Core's names what begins and ends."""

    @abstractmethod
    def begin(self, name: str) -> None:
        """It begins now."""

    @abstractmethod
    def end(self, name: str) -> None:
        """It ends now."""

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return _Timer(self, name)

    @contextlib.contextmanager
    def attached(self, config: Any) -> Iterator[None]:
        """In the place of the timers of a config of Megatron-Core meanwhile."""
        config.timers = self
        try:
            yield
        finally:
            config.timers = None


class _Timer:
    """One of the timers. It may be asked for barriers, which would measure other times than those of
    training."""

    def __init__(self, timers: Timers, name: str) -> None:
        self._timers, self._name = timers, name

    def start(self, barrier: bool = False) -> None:
        self._timers.begin(self._name)

    def stop(self, barrier: bool = False) -> None:
        self._timers.end(self._name)
