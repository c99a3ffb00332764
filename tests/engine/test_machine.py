"""A machine is described from outside, without torch, and whatever the driver says."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_moe.engine.machine import Gpu, Machine, look, visible

A100 = Gpu("NVIDIA A100-SXM4-80GB", 81920 * 2**20, (8, 0))
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, (9, 0))


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Machine:
    """This machine with a program of that name that does `body`."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return look()


@pytest.mark.second_pair
def test_packages_are_those_that_are_installed() -> None:
    machine = look()
    assert machine.packages["torch"] == importlib.metadata.version("torch")
    assert machine.packages["megatron-core"] == importlib.metadata.version("megatron-core")
    assert machine.torch_cuda == torch.version.cuda
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.memory_bytes > 2**28


def test_looking_loads_no_torch() -> None:
    program = (
        "import sys; from megatron_moe.engine.machine import look; look(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_gpus_are_those_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "590.44.01, NVIDIA H100 80GB HBM3, 81559, 9.0\n590.44.01, NVIDIA A100-SXM4-80GB, 81920, 8.0"
    machine = nvidia_smi(tmp_path, monkeypatch, f"echo '{rows}'")
    assert machine.driver == "590.44.01"
    assert machine.gpus == (H100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert look().gpus == (A100,)


def test_a_driver_that_does_not_know_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = nvidia_smi(tmp_path, monkeypatch, "echo '590.1, NVIDIA GB10, [N/A], 12.1'")
    assert machine.gpus == (Gpu("NVIDIA GB10", 0, (12, 1)),)


def test_a_broken_driver_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "Failed to initialize NVML: Driver/library version mismatch"
    machine = nvidia_smi(tmp_path, monkeypatch, f"echo '{words}'; exit 18")
    assert machine.gpus == ()
    assert machine.gpu_complaint == words


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, (H100, A100)),
        ("", ()),
        ("-1", ()),
        ("1,0", (A100, H100)),
        ("0,7,1", (H100,)),
        ("GPU-8a", (H100, A100)),
    ],
)
def test_cuda_visible_devices(variable: str | None, expected: tuple[Gpu, ...]) -> None:
    assert visible((H100, A100), variable) == expected
