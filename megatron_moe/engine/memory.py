"""Bytes of tensors: how many there are now, and how many there were at most.

A GPU's allocator counts them. On a host torch's own allocator tells a profiler of each allocation and each
release, those inside of operations included; torch's older profiler is used for it, which starts in a tenth
of a millisecond, prints nothing, and changes nothing of what is computed (seen with torch 2.13 and 2.15). It
sees what this process's training thread allocates, and not what the threads of collectives do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """Bytes at a moment, and the most since the reading before. On a host they count from the meter's
    start: below zero where what was there before was released."""

    live: int
    peak: int


class Meter(Protocol):
    """Reads the memory of this process's device, between its start and its stop."""

    def start(self) -> None: ...

    def read(self) -> Reading: ...

    def stop(self) -> None: ...


def meter(device: torch.device) -> Meter:
    """A meter for the device of this process."""
    return DeviceMeter() if device.type == "cuda" else HostMeter()


class DeviceMeter:
    """What torch's allocator gave out, not what it reserved."""

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def read(self) -> Reading:
        reading = Reading(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return reading

    def stop(self) -> None:
        """Nothing goes on that would have to end."""


class HostMeter:
    """What torch's allocator gives out and takes back. Must not be read inside an operation: between passes
    of the schedule, not in a hook of autograd; for moments there, `moments` names them."""

    def __init__(self) -> None:
        self._live = 0
        self._running = False

    def start(self) -> None:
        self._live = 0
        self._resume()

    def read(self) -> Reading:
        """Events are kept until they are read: read it every now and then."""
        reading = self.moments()[-1][1]
        self._resume()
        return reading

    def stop(self) -> None:
        if self._running:
            self._end()

    def moments(self) -> list[tuple[str, Reading]]:
        """Stops; the readings at every moment that `torch.profiler.record_function` named since the last
        reading, and at the end, under an empty name."""
        found, peak = [], self._live
        for event in self._end():
            if event.kind() == "memory_alloc":
                self._live += event.cpu_memory_usage()
                peak = max(peak, self._live)
            elif event.kind() == "push" and event.name().startswith(MOMENT):
                found.append((event.name().removeprefix(MOMENT), Reading(self._live, peak)))
                peak = self._live
        return [*found, ("", Reading(self._live, peak))]

    def _resume(self) -> None:
        autograd: Any = torch.autograd
        settings = (False, True, False, False, False, torch._C._profiler._ExperimentalConfig())
        config = autograd.ProfilerConfig(autograd.ProfilerState.CPU, *settings)
        torch._C._autograd._enable_profiler_legacy(config)
        self._running = True

    def _end(self) -> list[Any]:
        """Events of what was allocated, and of what ran, in their order."""
        self._running = False
        of_threads = torch._C._autograd._disable_profiler_legacy()
        return [event for events in of_threads for event in events]


MOMENT = "megatron_moe/"
"""Begins the names of moments for `HostMeter.moments`."""


def static_bytes(chunks: Iterable[torch.nn.Module], optimizer: Any) -> int:
    """Bytes of weights, gradient buffers and optimizer state of a rank, shared memory once.

    Args:
        chunks: wrapped model chunks of this rank.
    """
    storages = [tensor.untyped_storage() for tensor in _static_tensors(chunks, optimizer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _static_tensors(chunks: Iterable[Any], optimizer: Any) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from chunk.parameters()
        yield from chunk.module.buffers()
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield from (data for data in (buffer.param_data, buffer.grad_data) if data is not None)
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            yield from part.get_parameters()
            states = (state.values() for state in part.optimizer.state.values())
            yield from (value for values in states for value in values if isinstance(value, Tensor))
