"""The host device: what stands in for torch.cuda on a machine without a GPU.

Megatron-Core asks torch.cuda for the current device, random states, streams and events, and names "cuda" as
the device of small tensors. Each such call that training makes is listed in `STAND_INS` with its replacement
and the reason. They are installed once for the process, never where CUDA is there, and touch nothing else of
torch. Seen with megatron-core 0.16.1 and 0.19.2; a test holds each entry against the installed version's
source.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

HOST = torch.device("cpu")


class HostStream:
    """A stream that runs everything at once, in order: there is only one queue on the host."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> HostEvent:
        return event or HostEvent()


class HostEvent:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_STREAM = HostStream()


@contextlib.contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


def _itself() -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_state() -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: torch.get_rng_state()


def _set_state() -> Callable[..., None]:
    return lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def _returns(value: Any) -> Callable[..., Any]:
    """A new function each time: torch's tracer refuses one function under two of its names."""
    return lambda *args, **kwargs: value


def _not_compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return function if function is not None else lambda decorated: decorated


def _is_cuda_name(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with device="cuda" read as the host, and pinned memory as plain memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda_name(kwargs.get("device")):
            kwargs["device"] = HOST
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` with the name that a CUDA tensor of the same dtype has."""

    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_name


def _sizes_as_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-Core converts sizes to numpy only where it copies them off a GPU; all_to_all_single takes no
    tensors as sizes."""

    @functools.wraps(original)
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return to_host


@dataclass(frozen=True)
class StandIn:
    """One replaced attribute.

    Attributes:
        target: dotted path below `torch` or `megatron`, e.g. ``torch.cuda.current_device``.
        replacement: the new value, or a function of the old one where `wraps` is set.
        reason: why training on the host needs it.
        seen_in: text that stands in the source of Megatron-Core where it does.
    """

    target: str
    replacement: Any
    reason: str
    seen_in: str
    wraps: bool = False


_FACTORIES = "literal device='cuda' in schedules, optimizer, gradient clipping, buffers, aux-loss tracker"
_RNG = "the tensor-parallel random state tracker keeps named states of the device's generator"

STAND_INS: tuple[StandIn, ...] = (
    StandIn("torch.cuda.current_device", _returns(HOST), "passed as device=", "torch.cuda.current_device()"),
    StandIn(
        "torch.cuda.set_device", _returns(None), "each rank chooses its device", "torch.cuda.set_device("
    ),
    StandIn("torch.cuda.device_count", _returns(1), "checkpoint placement", "torch.cuda.device_count()"),
    StandIn(
        "torch.cuda.synchronize",
        _returns(None),
        "nothing runs behind the host's back",
        "torch.cuda.synchronize(",
    ),
    StandIn("torch.cuda.empty_cache", _returns(None), "no caching allocator", "torch.cuda.empty_cache()"),
    StandIn("torch.cuda.memory_allocated", _returns(0), "no device memory", "torch.cuda.memory_allocated("),
    StandIn("torch.cuda.Stream", HostStream, "dispatcher and shared experts", "torch.cuda.Stream("),
    StandIn("torch.cuda.Event", HostEvent, "dispatcher and shared experts", "torch.cuda.Event("),
    StandIn(
        "torch.cuda.current_stream", _returns(_STREAM), "dispatcher, overlap", "torch.cuda.current_stream()"
    ),
    StandIn(
        "torch.cuda.default_stream",
        _returns(_STREAM),
        "side streams start from it",
        "torch.cuda.default_stream",
    ),
    StandIn("torch.cuda.set_stream", _returns(None), "overlap", "torch.cuda.set_stream("),
    StandIn("torch.cuda.stream", _on_stream, "dispatcher, overlap", "torch.cuda.stream("),
    StandIn("torch.cuda.nvtx.range_push", _returns(None), "profiler marks", "torch.cuda.nvtx.range_push"),
    StandIn("torch.cuda.nvtx.range_pop", _returns(None), "profiler marks", "torch.cuda.nvtx.range_pop"),
    StandIn("torch.cuda.manual_seed", _seed, _RNG, "torch.cuda.manual_seed("),
    StandIn("torch.cuda.get_rng_state", _get_state(), _RNG, "torch.cuda.get_rng_state()"),
    StandIn("torch.cuda.set_rng_state", _set_state(), _RNG, "torch.cuda.set_rng_state("),
    StandIn("torch.cuda.random.get_rng_state", _get_state(), _RNG, "torch.cuda.random.get_rng_state("),
    StandIn(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        _set_state(),
        _RNG,
        "def _set_cuda_rng_state(",
    ),
    StandIn(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        _sizes_as_numpy,
        "all-to-all sizes",
        "maybe_move_tensor_to_cpu(",
        wraps=True,
    ),
    StandIn("torch.Tensor.cuda", _itself(), "batches, norms and sizes are moved to the device", ".cuda("),
    StandIn("torch.nn.Module.cuda", _itself(), "tied embedding weights are moved", ".cuda("),
    StandIn("torch.Tensor.record_stream", _returns(None), "memory reuse across streams", ".record_stream("),
    StandIn("torch.Tensor.pin_memory", _itself(), "staging of sizes and checkpoints", "pin_memory"),
    StandIn(
        "torch.Tensor.type",
        _type_name,
        "the optimizer groups parameters by name",
        "'torch.cuda.FloatTensor'",
        True,
    ),
    StandIn(
        "torch.compile",
        _not_compiled,
        "small activations would wait for a C++ compiler",
        "jit_fuser = torch.compile",
    ),
    *(
        StandIn(f"torch.{name}", _on_host, _FACTORIES, seen, True)
        for name, seen in (
            ("tensor", "torch.tensor("),
            ("zeros", "torch.zeros("),
            ("ones", "torch.ones("),
            ("empty", "torch.empty("),
            ("empty_like", "torch.empty_like("),
            ("arange", "torch.arange("),
        )
    ),
)

_originals: dict[str, Any] = {}


def _resolve(target: str) -> tuple[Any, str]:
    """The object that holds the last name of `target`, and that name."""
    import importlib

    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            holder = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            holder = getattr(holder, part)
        return holder, parts[-1]
    raise AttributeError(target)


def install() -> None:
    """Install the stand-ins, once a process. Must not be called where CUDA is available."""
    assert not torch.cuda.is_available(), "the host's stand-ins must never hide a GPU"
    if _originals:
        return
    for stand_in in STAND_INS:
        if stand_in.target.startswith("torch."):
            _install_one(stand_in)
    # Only now may Megatron-Core be imported: its modules read some of these at import.
    for stand_in in STAND_INS:
        if not stand_in.target.startswith("torch."):
            _install_one(stand_in)


def _install_one(stand_in: StandIn) -> None:
    holder, name = _resolve(stand_in.target)
    original = getattr(holder, name)
    _originals[stand_in.target] = original
    setattr(holder, name, stand_in.replacement(original) if stand_in.wraps else stand_in.replacement)


def is_installed() -> bool:
    """Whether this process trains on the host device."""
    return bool(_originals)
