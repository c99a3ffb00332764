"""The host device: what stands in for torch.cuda on a machine without a GPU.

Megatron-Core asks torch.cuda for the current device, random states, streams and events, and names "cuda" as
the device of small tensors. Each such call that training makes is listed in `STAND_INS` with its replacement
and the reason. They are installed once for the process, never where CUDA is there, and touch nothing else of
torch. Seen with megatron-core 0.16.1 and 0.19.2; a test holds each entry against the installed version's
source.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_moe.engine.stand_ins import (
    HOST,
    HostStream,
    exact_norm,
    gather_unequal,
    host_state,
    itself,
    not_compiled,
    on_host,
    on_stream,
    reduce_scatter_unequal,
    returns,
    seed_host,
    set_host_state,
    sizes_as_numpy,
    type_name_of_cuda,
)


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


_FACTORIES = "small tensors with device='cuda' in schedules, optimizer and gradient clipping"
_RANDOM = "the tensor-parallel tracker keeps named states of the device's generator"
_BATCHES = "the schedule for two microbatches at once orders and marks its work"
_STREAMS = "the dispatcher and overlapped shared experts order their work by streams"

STAND_INS: tuple[StandIn, ...] = (
    StandIn("torch.cuda.current_device", returns(HOST), "passed as device=", "torch.cuda.current_device()"),
    StandIn("torch.cuda.synchronize", returns(None), "nothing runs ahead here", "torch.cuda.synchronize("),
    StandIn("torch.cuda.Stream", HostStream, _STREAMS, "torch.cuda.Stream("),
    StandIn("torch.cuda.Event", HostStream, _BATCHES, "torch.cuda.Event("),
    StandIn("torch.cuda.nvtx.range_push", returns(None), _BATCHES, "torch.cuda.nvtx.range_push("),
    StandIn("torch.cuda.nvtx.range_pop", returns(None), _BATCHES, "torch.cuda.nvtx.range_pop("),
    StandIn("torch.Tensor.record_stream", returns(None), _BATCHES, ".record_stream("),
    StandIn("torch.cuda.current_stream", returns(HostStream()), _STREAMS, "torch.cuda.current_stream()"),
    StandIn("torch.cuda.stream", on_stream, _STREAMS, "torch.cuda.stream("),
    StandIn("torch.cuda.manual_seed", seed_host, _RANDOM, "torch.cuda.manual_seed("),
    StandIn("torch.cuda.get_rng_state", host_state, _RANDOM, "torch.cuda.get_rng_state()"),
    StandIn("torch.cuda.set_rng_state", set_host_state, _RANDOM, "torch.cuda.set_rng_state("),
    StandIn("torch.cuda.random.get_rng_state", host_state, _RANDOM, "torch.cuda.random.get_rng_state("),
    StandIn(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        set_host_state,
        _RANDOM,
        "def _set_cuda_rng_state(",
    ),
    StandIn(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        sizes_as_numpy,
        "all_to_all_single takes no tensors as sizes",
        "maybe_move_tensor_to_cpu(",
        wraps=True,
    ),
    StandIn(
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
        gather_unequal,
        "gloo gathers only equal parts",
        "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
        wraps=True,
    ),
    StandIn(
        "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        reduce_scatter_unequal,
        "gloo scatters only equal parts",
        "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",
        wraps=True,
    ),
    StandIn(
        "megatron.core.optimizer.clip_grads.l2_norm_impl",
        exact_norm,
        "its own adds up millions of squares in float32, one by one",
        "l2_norm_impl = local_multi_tensor_l2_norm",
    ),
    StandIn("torch.Tensor.cuda", itself, "gradients and tied embeddings are moved to the device", ".cuda("),
    StandIn(
        "torch.Tensor.type",
        type_name_of_cuda,
        "the optimizer compares names of types",
        "'torch.cuda.FloatTensor'",
        wraps=True,
    ),
    StandIn(
        "torch.compile",
        not_compiled,
        "small functions would wait for a C++ compiler",
        "jit_fuser = torch.compile",
    ),
    StandIn("torch.tensor", on_host, _FACTORIES, "torch.tensor(", wraps=True),
    StandIn("torch.zeros", on_host, _FACTORIES, "torch.zeros(", wraps=True),
)

_originals: dict[str, Any] = {}


def _resolve(target: str) -> tuple[Any, str]:
    """The object that holds the last name of `target`, and that name."""
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
    # `with torch.device(..)` lists the functions that make tensors when it is first used. It must know these
    # by themselves: else what other libraries build on the meta device is not there.
    _device_constructors()
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
