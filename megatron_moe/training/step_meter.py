"""Measures steps: which of them, what of them, and where it goes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_moe.engine import memory, schedule
from megatron_moe.engine.stopwatch import BACKWARD, FORWARD, Stopwatch
from megatron_moe.training import communication, timeline
from megatron_moe.training.stage_metrics import stage_metrics
from megatron_moe.training.terminal import say

if TYPE_CHECKING:
    from megatron_moe.training.trainer import Trainer


class StepMeter:
    """Measures every `logging.detail_interval`-th step of a trainer, and step `logging.timeline_iter`.

    Memory is a GPU's own count of each such step. On a host it is traced, which takes time: in the first step
    of a start, and only where a later record will tell of it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        settings, last = trainer.experiment.logging, trainer.experiment.training.train_iters
        next_detail = (trainer.iteration // settings.detail_interval + 1) * settings.detail_interval
        self._traces_next = trainer.device.is_host and next_detail <= last
        self._peak_bytes = math.nan
        self._stopwatch: Stopwatch | None = None
        self._trace: _Trace | None = None
        self._detailed = self._shown = False

    @contextlib.contextmanager
    def step(self) -> Iterator[Stopwatch | None]:
        """Around the next step; gives what measures its passes, if anything does."""
        trainer, device = self._trainer, self._trainer.device
        settings, iteration = trainer.experiment.logging, trainer.iteration + 1
        self._detailed = iteration % settings.detail_interval == 0
        self._shown = iteration == settings.timeline_iter
        if (self._detailed or self._shown) and communication.is_measured(trainer.experiment):
            communication.begin(trainer.chunks)
        if self._traces_next:
            self._trace, self._traces_next = _Trace(trainer.chunks, trainer.optimizer), False
        if self._shown:
            # Their clocks begin together.
            device.synchronize()
            dist.barrier()
        self._stopwatch = None
        if self._detailed or self._shown or self._trace is not None:
            on_end = None if self._trace is None else self._trace.passed
            self._stopwatch = Stopwatch(device.torch_device, on_end)
        if self._detailed and not device.is_host:
            torch.cuda.reset_peak_memory_stats()
        try:
            yield self._stopwatch
            if self._trace is not None:
                self._peak_bytes = self._trace.peak_bytes()
            elif self._detailed and not device.is_host:
                self._peak_bytes = torch.cuda.max_memory_allocated()
        finally:
            if self._trace is not None:
                self._trace.stop()
                self._trace = None

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Around the update of the weights."""
        if self._trace is not None:
            self._trace.pipeline_done()
        with (
            contextlib.nullcontext() if self._stopwatch is None else self._stopwatch.measure(timeline.UPDATE)
        ):
            yield

    def take(self, num_microbatches: int) -> dict[str, Any]:
        """What the step's record gets; also writes the timeline. A collective over the world if there is
        anything to tell."""
        trainer, stopwatch = self._trainer, self._stopwatch
        if stopwatch is None or not (self._detailed or self._shown):
            return {}
        device, layout, moe = trainer.device.torch_device, trainer.plan.layout, trainer.experiment.moe
        # Megatron-Core's schedule for two microbatches at once does not say where one pass ends.
        merged = moe is not None and moe.overlap_moe_expert_parallel_comm
        spans = None if merged else stopwatch.spans()
        if self._shown and spans is not None:
            waits = communication.waits(trainer.chunks, stopwatch)
            order = schedule.passes(
                num_microbatches, layout.pipeline_model_parallel_size, len(trainer.chunks)
            )
            path = trainer.run_folder / timeline.FILE
            timeline.write(path, trainer.iteration, layout, stopwatch.made_s, spans, waits, order)
            if dist.get_rank() == 0:
                line = f"Timeline of step {trainer.iteration}: {path}; https://ui.perfetto.dev shows it"
                say([line], trainer.run_folder / "log.txt")
        record: dict[str, Any] = {}
        if communication.is_measured(trainer.experiment):
            record |= communication.end(trainer.chunks, device)
            if not communication.overlaps(trainer.experiment):
                # What was not waited for went into launching.
                record["moe/exposed_communication_ms"] = record["moe/communication_ms"]
        record |= stage_metrics(layout, spans, self._peak_bytes, num_microbatches, device)
        return record if self._detailed else {}


class _Trace:
    """The most memory that a step needs, on a host.

    The optimizer makes its state in the first update of a run; later steps have it from their beginning.
    """

    def __init__(self, chunks: list[torch.nn.Module], optimizer: Any) -> None:
        self._parts = (chunks, optimizer)
        self._before = memory.static_bytes(*self._parts)
        self._peak = self._pipeline_peak = 0
        self._meter = memory.HostMeter()
        self._meter.start()

    def passed(self, name: str) -> None:
        """Something ended: read what the meter holds before it becomes much."""
        if name in (FORWARD, BACKWARD):
            self._read()

    def pipeline_done(self) -> None:
        self._read()
        self._pipeline_peak, self._peak = self._peak, 0

    def peak_bytes(self) -> float:
        self._read()
        after = memory.static_bytes(*self._parts)
        return max(after + self._pipeline_peak, self._before + self._peak)

    def stop(self) -> None:
        self._meter.stop()

    def _read(self) -> None:
        self._peak = max(self._peak, self._meter.read().peak)
