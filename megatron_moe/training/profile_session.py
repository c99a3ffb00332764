"""A small model in training, whose pieces are measured.

It has all kinds of pieces in their real shapes, few layers of each kind, and trains with the schedule, the
gradient buffers and the optimizer of training. Moments between pieces are taken while microbatches pass
(`engine.piece_marks`): so caches, allocator and neighbours are those of a pass through a whole stage.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.engine import schedule
from megatron_moe.engine.piece_marks import BACK, BEGIN, END, OUTPUT, MemoryMarks, Places, TimeMarks, place
from megatron_moe.engine.stopwatch import BACKWARD, FORWARD, GATHER, Stopwatch
from megatron_moe.plan import plan
from megatron_moe.plan.units import Kind
from megatron_moe.training import communication
from megatron_moe.training.build import start
from megatron_moe.training.forward import Batch, forward_step
from megatron_moe.training.piece_memory import Bytes, kept_and_working
from megatron_moe.training.trainer import Trainer

WARM_UP, REPETITIONS = 3, 9
"""Steps; the median over the repetitions is what counts."""

Way = Literal["plain", "again", "frozen"]
"""As the experiment says; every layer computed again; without gradients of weights."""
Costs = dict[Kind, float]
"""Seconds or bytes of one microbatch in one piece of each kind."""
Value = TypeVar("Value")


class Session:
    """A small model in training, and its measurements, means over all ranks."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        its_plan = plan.make(experiment, profiled=False)
        self.trainer: Trainer = start(experiment, its_plan, folder)
        self.places = Places(self.trainer.chunks[0])
        self.kinds: list[Kind] = ["moe" if has_experts else "dense" for has_experts in moe_layers(experiment)]
        self.has_mtp = experiment.model.mtp_num_layers > 0
        self._batches = self.trainer.microbatches(self.trainer.datasets.train, 0, shuffle=True)
        self._ways: dict[Way, Callable[[], contextlib.AbstractContextManager[None]]] = {
            "plain": contextlib.nullcontext,
            "again": self._again,
            "frozen": self._frozen,
        }
        self._microbatches = self.trainer.shapes().num_microbatches
        for _ in range(WARM_UP):
            self._step(None)

    def times(self) -> dict[Way, tuple[Costs, Costs]]:
        """Seconds forward and backward in each way of training. They take turns, so that their differences
        are not those of what else the machine does."""
        found: dict[Way, tuple[list[list[Costs]], list[list[Costs]]]] = {way: ([], []) for way in self._ways}
        for repetition in range(REPETITIONS + 1):
            for way, (forward, backward) in found.items():
                marks = TimeMarks(self.trainer.device.torch_device)
                with self._ways[way]():
                    self._step(marks)
                passes = [dict(moments) for moments in _passes(marks.take())]
                if repetition > 0:  # the first one warms up
                    forward.append([self._forward(at) for at in passes])
                    backward.append([self._backward(at) for at in passes])
        return {way: (self._typical(steps), self._typical(back)) for way, (steps, back) in found.items()}

    def _forward(self, at: dict[str, float]) -> Costs:
        last = place(len(self.kinds))
        layers = [at[place(n + 1)] - at[place(n)] for n in range(len(self.kinds))]
        rest: Costs = {"embedding": at[place(0)] - at[BEGIN + FORWARD]}
        if self.has_mtp:
            rest["mtp"] = at[OUTPUT] - at[last]
        rest["head"] = at[END + FORWARD] - at[OUTPUT if self.has_mtp else last]
        return self._by_kind(layers, rest)

    def _backward(self, at: dict[str, float]) -> Costs:
        last = BACK + place(len(self.kinds))
        layers = [at[BACK + place(n)] - at[BACK + place(n + 1)] for n in range(len(self.kinds))]
        rest: Costs = {"embedding": at[END + BACKWARD] - at[BACK + place(0)]}
        if self.has_mtp:
            rest["mtp"] = at[last] - at[BACK + OUTPUT]
        rest["head"] = at[BACK + OUTPUT if self.has_mtp else last] - at[BEGIN + BACKWARD]
        return self._by_kind(layers, rest)

    def memory(self, way: Way) -> tuple[Costs, Costs]:
        """Bytes kept between forward and backward, and what is needed beside them while a piece runs: medians
        over microbatches and layers, as on a host what another thread releases is missed. In a step of its
        own, which this slows down."""
        marks = MemoryMarks(self.trainer.device.torch_device)
        with self._ways[way]():
            self._step(marks)
        boundary = self.places.boundary_bytes
        passes = [
            kept_and_working(moments, self.kinds, self.has_mtp, boundary) for moments in _passes(marks.take())
        ]
        return self._most([kept for kept, _ in passes]), self._most([working for _, working in passes])

    def communication(self) -> tuple[float, float]:
        """Seconds of a microbatch, in one MoE layer, of experts' all-to-all: waited for, and hidden."""
        trainer = self.trainer
        if not communication.is_measured(trainer.experiment):
            return 0.0, 0.0
        found = []
        for _ in range(REPETITIONS):
            communication.begin(trainer.chunks)
            self._step(None)
            found.append(communication.end(trainer.chunks, trainer.device.torch_device))
        passes = 1000 * self._microbatches * self.kinds.count("moe")
        under_way = statistics.median(step["moe/communication_ms"] for step in found) / passes
        exposed = statistics.median(step["moe/exposed_communication_ms"] for step in found) / passes
        return exposed, max(0.0, under_way - exposed)

    def update(self) -> tuple[float, int]:
        """Seconds of an update on the slowest rank, and the parameters that it updates. Without gathering the
        weights, which other replicas hold here than in training."""
        found = []
        for _ in range(REPETITIONS):
            stopwatch = Stopwatch(self.trainer.device.torch_device)
            self._step(None, stopwatch)
            *parts, whole = stopwatch.spans()
            gathered = sum(span.duration_s for span in parts if span.name == GATHER)
            found.append(whole.duration_s - gathered)
        optimizers = self.trainer.optimizer.chained_optimizers
        updated = sum(weight.numel() for part in optimizers for weight in part.get_parameters())
        most = torch.tensor([statistics.median(found), updated], dtype=torch.float64)
        most = most.to(self.trainer.device.torch_device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most[0]), int(most[1])

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Every layer is computed again, by itself."""
        from megatron.core.utils import get_model_config

        config = get_model_config(self.trainer.chunks[0])
        names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
        before = [getattr(config, name) for name in names]
        for name, value in zip(names, ("full", "block", len(self.kinds)), strict=True):
            setattr(config, name, value)
        yield
        for name, value in zip(names, before, strict=True):
            setattr(config, name, value)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """No weight gets a gradient meanwhile but those of the embedding, without which there were no
        backward pass."""
        weights = [w for name, w in self.trainer.chunks[0].named_parameters() if "embedding." not in name]
        for weight in weights:
            weight.requires_grad_(False)
        yield
        for weight in weights:
            weight.requires_grad_(True)

    def _step(self, marks: TimeMarks | MemoryMarks | None, stopwatch: Stopwatch | None = None) -> None:
        """One step of training, without what is told of it."""
        trainer = self.trainer
        optimizers = trainer.optimizer.chained_optimizers
        schedule.zero_gradients(trainer.chunks, trainer.optimizer)
        iterators = trainer.iterators(self._batches, trainer.shapes())
        self.places.marks = marks
        dist.barrier()
        schedule.run(trainer.chunks, iterators, self._forward_step, trainer.shapes(), stopwatch=marks)
        self.places.marks = None
        with contextlib.ExitStack() as measured:
            if stopwatch is not None:
                # Nobody is waited for in the first sum over ranks.
                dist.barrier()
                for config in {id(part.config): part.config for part in optimizers}.values():
                    measured.enter_context(stopwatch.attached(config))
                measured.enter_context(stopwatch.measure("update"))
            schedule.update(trainer.optimizer, trainer.chunks)

    def _forward_step(
        self, batches: Iterator[Batch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], object]]:
        with self.places.forward():
            return forward_step(batches, chunk)

    def _by_kind(self, layers: Sequence[float], rest: Costs) -> Costs:
        """Layers of a kind as their mean."""
        found = {**rest}
        for kind in dict.fromkeys(self.kinds):
            of_kind = [cost for cost, its_kind in zip(layers, self.kinds, strict=True) if its_kind == kind]
            found[kind] = statistics.fmean(of_kind)
        return found

    def _typical(self, steps: Sequence[Sequence[Costs]]) -> Costs:
        """The mean over a step's microbatches, the median of steps, the mean over ranks: ranks that wait for
        each other share their times."""
        kinds = list(steps[0][0])
        means = [[statistics.fmean(passed[kind] for passed in step) for kind in kinds] for step in steps]
        medians = [statistics.median(column) for column in zip(*means, strict=True)]
        total = torch.tensor(medians, dtype=torch.float64, device=self.trainer.device.torch_device)
        dist.all_reduce(total)
        return dict(zip(kinds, (total / dist.get_world_size()).tolist(), strict=True))

    def _most(self, passes: Sequence[Bytes]) -> Costs:
        """The median of a kind of piece on the rank with the most."""
        found: dict[Kind, list[float]] = {}
        for kind, size in (entry for passed in passes for entry in passed):
            found.setdefault(kind, []).append(size)
        medians = [statistics.median(sizes) for sizes in found.values()]
        most = torch.tensor(medians, dtype=torch.float64, device=self.trainer.device.torch_device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return dict(zip(found, most.tolist(), strict=True))


def _passes(moments: Sequence[tuple[str, Value]]) -> list[list[tuple[str, Value]]]:
    """The moments of each microbatch, from the beginning of its forward to the end of its backward pass; what
    lies between them is left out."""
    found: list[list[tuple[str, Value]]] = []
    inside = False
    for name, value in moments:
        if name == BEGIN + FORWARD:
            found.append([])
            inside = True
        if inside:
            found[-1].append((name, value))
        if name == END + BACKWARD:
            inside = False
    return found
