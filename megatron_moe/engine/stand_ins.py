"""What the host device puts in the place of torch.cuda's functions; `engine.host` says where and why."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

HOST = torch.device("cpu")


class HostStream:
    """A stream, and an event on one: everything has run when it is asked, for the host has only one queue."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self) -> HostStream:
        return self

    def wait(self, stream: Any) -> None: ...

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """What follows runs where everything runs."""
    yield


def itself(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A tensor that is moved to where it is."""
    return self


def seed_host(seed: int) -> None:
    """Seed the host's generator."""
    torch.default_generator.manual_seed(seed)


def host_state(*args: Any, **kwargs: Any) -> Tensor:
    """The state of the host's generator; a device is not looked at."""
    return torch.get_rng_state()


def set_host_state(new_state: Tensor, *args: Any, **kwargs: Any) -> None:
    """Set the state of the host's generator."""
    torch.set_rng_state(new_state)


def returns(value: Any) -> Callable[..., Any]:
    """A function that does nothing but return `value`."""
    return lambda *args, **kwargs: value


def not_compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile`, as function or decorator, that leaves functions as they are."""
    return function if function is not None else lambda decorated: decorated


def _is_cuda_name(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with device="cuda" read as the host, and pinned memory as plain memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda_name(kwargs.get("device")):
            kwargs["device"] = HOST
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def type_name_of_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` with the name that a CUDA tensor of the same dtype has."""

    @functools.wraps(original)
    def type_name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_name


def sizes_as_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-Core converts sizes to numpy only where it copies them off a GPU; all_to_all_single takes no
    tensors as sizes."""

    @functools.wraps(original)
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return to_host


def gather_unequal(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_gather_along_first_dim` where ranks give different numbers of rows, which gloo's all_gather refuses:
    all pad to the longest."""

    @functools.wraps(original)
    def gather(
        input_: Tensor,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            result: Tensor = original(input_, group, output_split_sizes, use_global_buffer)
            return result
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather


def reduce_scatter_unequal(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_reduce_scatter_along_first_dim` where ranks get different numbers of rows, which gloo's
    reduce_scatter refuses: all sum the whole and keep their part."""

    @functools.wraps(original)
    def reduce_scatter(
        input_: Tensor,
        group: Any,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            result: Tensor = original(input_, group, input_split_sizes, use_global_buffer)
            return result
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    return reduce_scatter


_BLOCK = 1 << 12
"""Numbers whose squares float32 adds up to 1e-7."""


def exact_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """[1] the norm of all tensors together, summed in float64 over blocks. In one go float32 is off by up to
    5e-4 for a vocabulary's gradient of which few rows are large, and in each layout by something else."""
    blocks = [
        block for tensors in tensor_lists for tensor in tensors for block in tensor.flatten().split(_BLOCK)
    ]
    if not blocks:
        return torch.zeros(1), None
    norms = torch.stack(torch._foreach_norm(blocks)).double()
    return norms.norm().float().view(1), None
