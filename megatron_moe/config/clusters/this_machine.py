"""The machine that this process runs on, as far as files of the system and the driver tell; without torch.

A GPU is known by its name, and one that has no preset is taken for an A100. Without one the ranks share the
host: its cores, their clock and vector units make the peak, and its memory, or what a control group leaves of
it, is divided among the ranks. Where the system does not tell something, the constants below stand for it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megatron_moe.config.clusters import PRESETS
from megatron_moe.config.clusters.preset import Preset

_NAMES = {
    "A800": "a800",
    "A100": "a100",
    "H800": "h800",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "RTX 4090": "rtx4090",
}
"""Part of a GPU's name -> its preset."""
_UNKNOWN_GPU = "a100"

_FP32_FLOPS_A_CYCLE = {"avx512f": 64, "avx2": 32, "asimd": 16, "sse2": 8}
"""Flag of a processor -> fp32 operations of a core in a cycle: two units for fused products where there are
vectors of 256 bits or more."""
_BF16_FLOPS_A_CYCLE = {"amx_bf16": 1024, "avx512_bf16": 128}
_NO_BF16_UNITS = 1 / 8
"""bf16 over fp32 where the processor has no units for it (1 to 19 over 80 to 155 GFLOP/s seen)."""
_CLOCK_GHZ = 2.5
"""Stated, where the system does not tell."""
_GB_S_A_CORE = 8.0
_GB_S_OF_A_HOST = 200.0
"""Stated: memory's bandwidth that one core reaches, and all of them."""
_PROCESS_GIB = 0.6
"""Python, torch and Megatron-Core in a process; of a small machine it is counted as a quarter at most."""


@dataclass(frozen=True)
class Host:
    """What a host computes with.

    Attributes:
        cores: that this process may use, threads of one core counted once.
        memory_bytes: that this process may use; None where the system does not tell.
    """

    cores: int
    clock_ghz: float
    flags: frozenset[str]
    memory_bytes: int | None


def preset(ranks: int, gpu_names: tuple[str, ...] | None = None, host: Host | None = None) -> Preset:
    """This machine's figures for a run of so many ranks; `gpu_names` and `host` for another machine's."""
    names = gpus() if gpu_names is None else gpu_names
    if names:
        known = (preset for part, preset in _NAMES.items() if part in names[0])
        return replace(PRESETS[next(known, _UNKNOWN_GPU)], gpus_per_node=len(names))
    return _of_host(look() if host is None else host, ranks)


def _of_host(host: Host, ranks: int) -> Preset:
    """A host, its cores and memory divided by the ranks."""
    cores = host.cores / ranks
    fp32 = cores * host.clock_ghz * _flops_a_cycle(host.flags, _FP32_FLOPS_A_CYCLE, 4) / 1000
    bf16 = cores * host.clock_ghz * _flops_a_cycle(host.flags, _BF16_FLOPS_A_CYCLE, 0) / 1000
    memory_gib = None if host.memory_bytes is None else float(f"{host.memory_bytes / 2**30 / ranks:.4g}")
    bandwidth = min(_GB_S_A_CORE * host.cores, _GB_S_OF_A_HOST) / ranks
    return Preset(
        gpus_per_node=ranks,
        memory_gib=memory_gib,
        reserved_gib=_PROCESS_GIB if memory_gib is None else min(_PROCESS_GIB, memory_gib / 4),
        peak_bf16_tflops=bf16 or fp32 * _NO_BF16_UNITS,
        peak_fp8_tflops=None,
        peak_fp32_tflops=fp32,
        achievable_fraction=0.50,  # stated: oneDNN or MKL on large products
        attention_fraction=0.25,  # stated: torch's fused attention on a processor
        matrix_padding=16,  # stated: a vector
        memory_bandwidth_gb_s=bandwidth,
        memory_fraction=0.80,  # stated
        kernel_us=30.0,  # stated: an operation of torch through autograd
        host_us=0.0,  # it is the device itself
        intra_node_gb_s=max(2.0, bandwidth / 4),  # stated: gloo over loopback
        intra_node_latency_us=400.0,  # stated: a message of gloo, the other rank waited for
        inter_node_gb_s=1.25,  # stated: 10 Gb/s Ethernet
        inter_node_latency_us=600.0,  # stated
        network_fraction=0.80,  # stated
        all_to_all_fraction=0.60,  # stated
        overlap_fraction=0.10,  # stated: the same cores do both
    )


def _flops_a_cycle(flags: frozenset[str], table: dict[str, int], otherwise: int) -> int:
    return next((flops for flag, flops in table.items() if flag in flags), otherwise)


@cache
def gpus() -> tuple[str, ...]:
    """Names of NVIDIA's GPUs that CUDA_VISIBLE_DEVICES leaves to this process; empty without."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", _text(file), re.MULTILINE)
        names.append(found[1].strip() if found else "unknown")
    # Containers and WSL may have the program without these files.
    names = names or _asked()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(names)
    listed = [entry for entry in visible.split(",") if entry.strip() not in ("", "-1")]
    return tuple(names[: len(listed)])


def _asked() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []


@cache
def look() -> Host:
    """The host of this process."""
    text = _text(Path("/proc/cpuinfo"))
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_package = [_number(rf"^{name}\s*:\s*(\d+)$", text) for name in ("siblings", "cpu cores")]
    threads_a_core = round(of_package[0] / of_package[1]) if all(of_package) else 1
    # Of processors of the x86 kind twice the nominal clock; "cpu MHz" would be the clock of the moment.
    bogomips = _number(r"^bogomips\s*:\s*([\d.]+)$", text)
    return Host(
        cores=max(1, usable // max(1, threads_a_core)),
        clock_ghz=bogomips / 2000 or _CLOCK_GHZ,
        flags=frozenset(flags[1].split()) if flags else frozenset(),
        memory_bytes=_memory_bytes(),
    )


def _memory_bytes() -> int | None:
    """The machine's memory, or what a control group limits it to."""
    kibibytes = _number(r"^MemTotal:\s*(\d+) kB$", _text(Path("/proc/meminfo")))
    limits = [int(kibibytes * 1024)] if kibibytes else []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _text(Path(file)).strip()
        limits += [int(limit)] if limit.isdecimal() and int(limit) else []
    return min(limits, default=None)


def _number(pattern: str, text: str) -> float:
    """The first number that a pattern finds; 0 where there is none."""
    found = re.search(pattern, text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _text(file: Path) -> str:
    """What a file of the system holds; nothing where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
