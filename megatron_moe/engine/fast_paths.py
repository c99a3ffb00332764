"""What a machine computes fast, what takes its place where something is missing, what that costs, and how to
get it.

`doctor` prints the table, and the log of a run names once, at its start, what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron_moe.config.device_needs import APEX, DEEP_EP, transformer_engine
from megatron_moe.engine.machine import BF16_FLAGS, Machine

_AMPERE, _ADA, _HOPPER = (8, 0), (8, 9), (9, 0)


@dataclass(frozen=True)
class FastPath:
    """One row of the table.

    Attributes:
        on: this machine has it.
        without: what takes its place where it is off, and what that costs. Numbers are measured, or published
            by who is named.
        remedy: how to get it.
    """

    name: str
    on: bool
    without: str
    remedy: str


_Row = tuple[str, Callable[[Machine], bool], str | Callable[[Machine], str], str]
"""Name; whether a machine has it; `FastPath.without`; `FastPath.remedy`."""


def _on_gpu(capability: tuple[int, int]) -> Callable[[Machine], bool]:
    """Whether every GPU has at least this compute capability, and torch can use them."""
    return lambda machine: (
        machine.torch_cuda is not None
        and bool(machine.gpus)
        and min(gpu.capability for gpu in machine.gpus) >= capability
    )


def _with(package: str, capability: tuple[int, int]) -> Callable[[Machine], bool]:
    return lambda machine: package in machine.packages and _on_gpu(capability)(machine)


def _has(*packages: str) -> Callable[[Machine], bool]:
    return lambda machine: all(package in machine.packages for package in packages)


def _instead_of_bf16(machine: Machine) -> str:
    if machine.gpus and machine.torch_cuda is not None:
        return "fp32, at a fraction of the speed"
    units = next((name for flag, name in BF16_FLAGS.items() if flag in machine.cpu_flags), None)
    if units is not None:
        return f"fp32; training.precision=bf16 uses the {units} units of this CPU"
    return "fp32 (80 to 155 GFLOP/s; bf16 without units for it 1 to 19, measured)"


_ROWS: tuple[_Row, ...] = (
    (
        "fused attention",
        _has("torch"),
        "torch is missing",
        "pip install 'torch>=2.13'",
    ),
    ("fused Adam", _has("torch"), "torch is missing", "pip install 'torch>=2.13'"),
    (
        "data helpers",
        _has("megatron-core"),
        "token files cannot be indexed",
        "pip install --force-reinstall --no-deps 'megatron-core>=0.16.1,<0.20'",
    ),
    (
        "bf16 products",
        _on_gpu(_AMPERE),
        _instead_of_bf16,
        "a GPU of compute capability 8.0 or higher (A100)",
    ),
    (
        "grouped products",
        _on_gpu(_AMPERE),
        "one product an expert, near dense speed on a CPU, slow on a GPU",
        "a GPU of compute capability 8.0 or higher (A100)",
    ),
    (
        "packed documents",
        _on_gpu(_AMPERE),
        "reset_attention_mask computes one document after the other",
        "a GPU of compute capability 8.0 or higher (A100)",
    ),
    ("NCCL", _on_gpu((0, 0)), "gloo, through the memory of the hosts", "a GPU"),
    (
        "Transformer Engine",
        _with("transformer-engine", (0, 0)),
        "native blocks only; RoPE and permutation unfused",
        f"{transformer_engine().source}; then model.spec: transformer_engine",
    ),
    (
        "FP8",
        _with("transformer-engine", _ADA),
        "bf16, at half the peak (H100: 989 of 1,979 TFLOP/s, NVIDIA's data sheet)",
        "Transformer Engine, and a GPU of compute capability 8.9 or higher (L40, H100)",
    ),
    (
        "DeepEP",
        _with("deep-ep", _HOPPER),
        "tokens travel by NCCL's all-to-all, sorted before and after by other kernels",
        f"on H100 or newer, {DEEP_EP['deepep'].source}; then moe.moe_token_dispatcher_type: flex",
    ),
    (
        "apex",
        _with("apex", (0, 0)),
        "no gradient_accumulation_fusion: weight gradients are added up in a kernel more",
        f"{APEX.source}; then training.gradient_accumulation_fusion: true",
    ),
)


def fast_paths(machine: Machine, broken: Collection[str] = ()) -> list[FastPath]:
    """The table for a machine; packages in `broken` are installed, and cannot be imported."""
    working = {name: version for name, version in machine.packages.items() if name not in broken}
    usable = dataclasses.replace(machine, packages=working)
    return [
        FastPath(
            name,
            on(usable),
            without if isinstance(without, str) else without(usable),
            remedy,
        )
        for name, on, without, remedy in _ROWS
    ]


def said_at_start(machine: Machine) -> str:
    """One line for the log of a run that names what is missing; empty if nothing is."""
    if not machine.gpus or machine.torch_cuda is None:
        return "No GPU here, and so none of its fast paths: see megatron-moe doctor"
    missing = [path.name for path in fast_paths(machine) if not path.on]
    if not missing:
        return ""
    names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
    return f"Without {names} here: for what that costs see megatron-moe doctor"
