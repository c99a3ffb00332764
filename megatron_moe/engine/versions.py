"""What differs between the supported versions of Megatron-Core (0.16.1 to 0.19), in one place."""

from __future__ import annotations

import functools
import importlib.metadata
import queue
from typing import Any


def moe_submodules(mlp: Any) -> Any:
    """The MoESubmodules inside a MoE layer spec: a ModuleSpec in 0.16, a `functools.partial` of the layer
    class in 0.19."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def build(spec: Any, *args: Any, **kwargs: Any) -> Any:
    """What a spec describes: a ModuleSpec, or a class or `functools.partial` of one."""
    if isinstance(spec, type | functools.partial):
        return spec(*args, **kwargs)
    from megatron.core.transformer.spec_utils import build_module

    return build_module(spec, *args, **kwargs)


def repair_missing_transformer_engine() -> None:
    """0.16.1 names `te_general_gemm` in the router's gating also where Transformer Engine is not installed:
    NameError."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def accept_as_linear(kind: type) -> None:
    """Let multi-latent attention build its narrow projections from `kind`.

    Megatron-Core builds them of a few classes only, which it compares by identity (0.16.1, 0.19.2). One of
    these is that of a library for quantized models, whose place it takes. And where Transformer Engine is
    missing, 0.16.1 asks whether a layer is an instance of a mock.
    """
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.Linear = kind
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.TELinear = kind


def write_checkpoints_in_process() -> None:
    """Let the rank itself write its checkpoint files.

    Megatron-Core hands even a plain, synchronous save to worker processes: a spawned manager that outlives
    the trainer and keeps its output open, and in 0.16 forked writers, unsafe beside gloo's threads, whose
    death leaves the trainer waiting for ever.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
    writer = filesystem_async.FileSystemWriterAsync
    if hasattr(writer, "write_preloaded_data_multiproc"):  # 0.16; 0.19 writes in the process with one thread
        writer.write_preloaded_data_multiproc = staticmethod(_write_buckets)


def _write_buckets(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """Write each bucket in turn; the results, or the first error, go to `results` as Megatron-Core
    expects."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: Any = {}
    for index, bucket in enumerate(buckets):
        done: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[Any] = queue.Queue()
        pending.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, done, pending, use_fsync=True)
        _, outcome = done.get()
        if isinstance(outcome, Exception):
            written = outcome
            break
        written[index] = outcome
    results.put(written)


def installed_versions() -> dict[str, str]:
    """Versions of what decides the numbers; recorded in each checkpoint."""
    return {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")}
