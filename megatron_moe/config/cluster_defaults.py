"""What `launch.cluster` leaves out, from its preset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_moe.config.clusters import PRESETS, this_machine
from megatron_moe.config.clusters.preset import Preset
from megatron_moe.config.schema import Experiment

_SHARED_BY_RANKS = (
    "gpus_per_node",
    "peak_fp32_tflops",
    "memory_bandwidth_gb_s",
    "intra_node_gb_s",
    "inter_node_gb_s",
)
"""Keys whose default is the preset's number of that name, which ranks share on a host without GPU."""
_PLAIN = (
    "achievable_fraction",
    "attention_fraction",
    "matrix_padding",
    "memory_fraction",
    "kernel_us",
    "host_us",
    "intra_node_latency_us",
    "inter_node_latency_us",
    "network_fraction",
    "all_to_all_fraction",
    "overlap_fraction",
)
"""The same for numbers that do not depend on the ranks."""


def _preset(e: Experiment) -> Preset:
    name = e.launch.cluster.preset
    if name != "this-machine":
        return PRESETS[name]
    if this_machine.gpus():
        return this_machine.preset(ranks=1)
    p = e.parallel
    assert p.data_parallel_size is not None
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    return this_machine.preset(ranks * p.data_parallel_size)


def _same(name: str) -> Callable[[Experiment, int | None], Any]:
    return lambda e, world_size: getattr(_preset(e), name)


def _plain(name: str) -> Callable[[Experiment, int | None], Any]:
    def of(e: Experiment, world_size: int | None) -> Any:
        preset = e.launch.cluster.preset
        found = this_machine.preset(ranks=1) if preset == "this-machine" else PRESETS[preset]
        return getattr(found, name)

    return of


def _is_host(e: Experiment) -> bool:
    return e.launch.cluster.preset == "this-machine" and not this_machine.gpus()


def _reserved_gib(e: Experiment, world_size: int | None) -> float:
    """On a host the process itself, unless the user says how much memory there is for what is planned."""
    if _is_host(e) and e.launch.cluster.memory_gib is not None:
        return 0.0
    return _preset(e).reserved_gib


def _peak_tflops(e: Experiment, world_size: int | None) -> float:
    preset, precision = _preset(e), e.training.precision
    if e.training.fp8 is not None and preset.peak_fp8_tflops is not None:
        return preset.peak_fp8_tflops
    in_fp32 = precision == "fp32" or (precision == "auto" and _is_host(e))
    return preset.peak_fp32_tflops if in_fp32 else preset.peak_bf16_tflops


CLUSTER_KEYS: list[tuple[str, Callable[[Experiment, int | None], Any]]] = [
    # It looks whether memory_gib is given.
    ("launch.cluster.reserved_gib", _reserved_gib),
    ("launch.cluster.memory_gib", _same("memory_gib")),
    *((f"launch.cluster.{name}", _same(name)) for name in _SHARED_BY_RANKS),
    *((f"launch.cluster.{name}", _plain(name)) for name in _PLAIN),
    ("launch.cluster.peak_tflops", _peak_tflops),
]
"""As `defaults.DERIVED_KEYS`, of which it is a part; behind the sizes of the layout."""
