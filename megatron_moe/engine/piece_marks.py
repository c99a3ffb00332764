"""Moments at which the passes of a microbatch go from one piece of the model to the next.

Pieces are the embedding, each layer, the multi-token prediction if there is any, and the rest up to the loss.
Forward, hooks of the modules tell where one ends. Backward, the gradient of what stands between two pieces
does: autograd computes everything behind it first, weight gradients included, also where a piece is computed
again. The schedule, gradient buffers and streams are those of training. Seen with megatron-core 0.16.1 and
0.19.2.
"""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_moe.engine import memory
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.engine.stopwatch import Clock, DeviceClock, HostClock
from megatron_moe.engine.timers import Timers

BEGIN, END = "begin ", "end "
"""Before Megatron-Core's names for what begins and ends."""
BACK = "back "
"""Before the name of a place that the backward pass comes to."""
OUTPUT = "output"
"""The place between multi-token prediction and output layer."""


def place(layer: int) -> str:
    """The place before a layer; they count from 0, and there is one more behind the last."""
    return f"layer {layer}"


class Marks(Timers):
    """Takes the place of Megatron-Core's timers for a while, and of hooks at places in the model."""

    @abstractmethod
    def mark(self, name: str) -> None:
        """Now."""

    def begin(self, name: str) -> None:
        self.mark(BEGIN + name)

    def end(self, name: str) -> None:
        self.mark(END + name)


class TimeMarks(Marks):
    """Seconds of each moment."""

    def __init__(self, device: torch.device) -> None:
        self._clock: Clock = DeviceClock() if device.type == "cuda" else HostClock()
        self._moments: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        self._moments.append((name, self._clock.now()))

    def take(self) -> list[tuple[str, float]]:
        """In their order. Waits for the device."""
        return [(name, self._clock.seconds(moment)) for name, moment in self._moments]


class MemoryMarks(Marks):
    """Memory at each moment, and the most since the moment before; counted from the making."""

    def __init__(self, device: torch.device) -> None:
        self._meter = memory.meter(device)
        self._read: list[tuple[str, memory.Reading]] = []
        self._meter.start()

    def mark(self, name: str) -> None:
        if isinstance(self._meter, memory.HostMeter):
            with torch.profiler.record_function(memory.MOMENT + name):
                pass
        else:
            self._read.append((name, self._meter.read()))

    def take(self) -> list[tuple[str, memory.Reading]]:
        """In their order; marks no longer."""
        if isinstance(self._meter, memory.HostMeter):
            return self._meter.moments()[:-1]
        return self._read


class Places:
    """Hooks at the places of a model chunk that has all pieces.

    Attributes:
        marks: gets the names of places as passes come to them; None: nobody does.
        on_the_way: whether a forward pass runs which is not one of something computed again.
        boundary_bytes: of what goes from layer to layer, a microbatch on this rank.
    """

    def __init__(self, chunk: torch.nn.Module) -> None:
        model: Any = unwrap(chunk)
        self.marks: Marks | None = None
        self.on_the_way = False
        self.boundary_bytes = 0
        self._outputs_to_come = 0
        self._mtp_layers = len(model.mtp.layers) if getattr(model, "mtp", None) is not None else 0
        for number, layer in enumerate(model.decoder.layers):
            self._hook(layer, functools.partial(self._at, place(number)))
        self._hook(
            model.decoder.final_layernorm, functools.partial(self._at, place(len(model.decoder.layers)))
        )
        if self._mtp_layers:
            self._hook(model.output_layer, self._at_output)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass of a microbatch."""
        self.on_the_way, self._outputs_to_come = True, self._mtp_layers
        yield
        self.on_the_way = False

    def _hook(self, module: torch.nn.Module, reached: Any) -> None:
        def before(module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> None:
            if self.on_the_way and self.marks is not None:
                reached(arguments[0] if arguments else named["hidden_states"])

        module.register_forward_pre_hook(before, with_kwargs=True)

    def _at(self, name: str, hidden_states: Tensor) -> None:
        marks = self.marks
        assert marks is not None
        self.boundary_bytes = hidden_states.nbytes
        hidden_states.register_hook(lambda gradient: marks.mark(BACK + name))
        marks.mark(name)

    def _at_output(self, hidden_states: Tensor) -> None:
        """The last use of the output layer is the main model's."""
        if self._outputs_to_come == 0:
            self._at(OUTPUT, hidden_states)
        self._outputs_to_come -= 1
