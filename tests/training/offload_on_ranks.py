"""Run on ranks: training with the optimizer on two devices, on a host that plays both.

Megatron-Core's HybridDeviceOptimizer asks each weight whether it is on the GPU, and moves a part to the host:
while it does, a tensor counts as the GPU's until it is moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import train_on_ranks
import verify_on_ranks
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.stand_ins import HostStream


def devices(experiment: Experiment, run: Path) -> tuple[int, int]:
    """Numbers of the state that this rank keeps on the host, and on the GPU."""
    with two_devices():
        optimizer = train_on_ranks.begin(experiment, run).optimizer
        counts = [0, 0]
        for part in optimizer.chained_optimizers:
            for index, groups in enumerate(
                (part.optimizer.cpu_param_groups, part.optimizer.gpu_param_groups)
            ):
                counts[index] += sum(weight.numel() for group in groups for weight in group["params"])
        return counts[0], counts[1]


def train(experiment: Experiment, run: Path, stop_at: int = 0) -> int:
    """As `train_on_ranks.train`."""
    with two_devices():
        return train_on_ranks.train(experiment, run, stop_at)


def verify_layout(experiment: Experiment, steps: int, folder: Path) -> None:
    """As `verify_on_ranks.layout_part`."""
    with two_devices():
        verify_on_ranks.layout_part(experiment, steps, folder)


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    """While it lasts, offloading works without a GPU."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    divide, empty, to = HybridDeviceOptimizer._get_sub_optimizer_param_groups, torch.empty, Tensor.to

    def divide_as_if_on_a_gpu(optimizer: Any, fraction: float) -> Any:
        with contextlib.ExitStack() as stack:
            for name in _COPIES:
                stack.enter_context(mock.patch.object(Tensor, name, _stays(getattr(Tensor, name))))
            stack.enter_context(mock.patch.object(Tensor, "is_cuda", _IS_CUDA, create=True))
            stack.enter_context(mock.patch.object(Tensor, "cpu", _to_the_host))
            stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor))
            return divide(optimizer, fraction)

    def empty_unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs)

    def to_the_host(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)

    with (
        mock.patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", divide_as_if_on_a_gpu),
        mock.patch.object(torch, "empty", empty_unpinned),
        mock.patch.object(Tensor, "to", to_the_host),
        mock.patch.object(HostStream, "wait", lambda *args: None, create=True),
    ):
        yield


_COPIES = ("detach", "clone", "float")
_IS_CUDA = property(lambda tensor: not hasattr(tensor, "is_moved"))


def _to_the_host(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    copy.is_moved = True  # type: ignore[attr-defined]
    return copy


def _stays(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A copy of what was moved is there too."""

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = method(tensor, *args, **kwargs)
        if hasattr(tensor, "is_moved"):
            copy.is_moved = True  # type: ignore[attr-defined]
        return copy

    return call
