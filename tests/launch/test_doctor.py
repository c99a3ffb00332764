"""`doctor` for machines of many kinds: what is wrong comes first, what is off says what that costs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.engine.fast_paths import fast_paths, said_at_start
from megatron_moe.engine.libraries import Libraries, culprit
from megatron_moe.engine.machine import Gpu, Machine
from megatron_moe.launch import findings as findings_module
from megatron_moe.launch.doctor import Report, lines
from megatron_moe.launch.findings import findings
from megatron_moe.launch.reports import of_exception

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0))
V100 = Gpu("Tesla V100-SXM2-32GB", 32 * 2**30, (7, 0))
LAPTOP = Machine(
    python="3.11.7",
    packages={"torch": "2.13.0", "megatron-core": "0.16.1"},
    cores=8,
    memory_bytes=32 * 2**30,
    shm_bytes=16 * 2**30,
    open_files=65536,
)
GPU_NODE = dataclasses.replace(
    LAPTOP,
    packages={**LAPTOP.packages, "transformer-engine": "2.5.0", "apex": "", "deep-ep": "1.2.1"},
    torch_cuda="13.0",
    driver="590.44.01",
    gpus=(H100,) * 8,
)


def wrong(machine: Machine, libraries: Libraries | None = None) -> list[tuple[str, bool]]:
    """What is wrong with it by itself, and whether that stops training."""
    return [(found.what, found.stops) for found in findings(machine, libraries or Libraries())]


def off(machine: Machine) -> list[str]:
    return [path.name for path in fast_paths(machine) if not path.on]


def report(machine: Machine, libraries: Libraries | None = None) -> Report:
    libraries = libraries or Libraries()
    return Report(machine, libraries, findings(machine, libraries), fast_paths(machine, libraries.broken))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this very machine's name and ports are says nothing about the ones above."""
    monkeypatch.setattr(findings_module, "_network", lambda: iter(()))


def test_nothing_is_wrong_with_a_laptop_or_a_gpu_node() -> None:
    assert wrong(LAPTOP) == []
    assert wrong(GPU_NODE) == []
    assert off(GPU_NODE) == []
    assert said_at_start(GPU_NODE) == ""
    assert said_at_start(LAPTOP).startswith("No GPU here")


@pytest.mark.parametrize(
    ("change", "libraries", "words", "stops"),
    [
        ({"packages": {"torch": "2.13.0"}}, {}, "megatron-core is not installed", True),
        ({"packages": {"megatron-core": "0.16.1"}}, {}, "torch is not installed", True),
        (
            {"packages": {**LAPTOP.packages, "megatron-core": "0.20.0"}},
            {},
            "megatron-core 0.20.0 is not",
            True,
        ),
        (
            {"packages": {**LAPTOP.packages, "megatron-core": "0.16.0rc1"}},
            {},
            "not among 0.16.1 to 0.19",
            True,
        ),
        (
            {"packages": {**LAPTOP.packages, "torch": "2.9.1+cu130"}},
            {},
            "torch 2.9.1+cu130 is not among",
            True,
        ),
        ({"packages": {**LAPTOP.packages, "torch": "2.14.0a0+4fdf77b940.nv26.8"}}, {}, "", False),
        ({"python": "3.14.0"}, {}, "Python 3.14.0 is not among 3.11 to 3.13", True),
        ({"driver": "590.44.01"}, {}, "torch was built without CUDA", True),
        (
            {"driver": "470.1", "torch_cuda": "13.0"},
            {"gpu_problem": "The NVIDIA driver on your system is too old"},
            "torch 2.13.0 for CUDA 13.0 cannot use the GPUs under driver 470.1: The NVIDIA driver on your",
            True,
        ),
        (
            {},
            {"broken": {"torch": "OSError: libcudart.so.13"}},
            "torch is installed, but cannot be imp",
            True,
        ),
        (
            {},
            {"broken": {"apex": "ImportError: undefined symbol"}},
            "apex is installed, but cannot be",
            False,
        ),
        ({"shm_bytes": 64 * 2**20}, {}, "/dev/shm has 64 MiB", False),
        ({"shm_bytes": None}, {}, "", False),
        ({"open_files": 256}, {}, "a process may open 256 files", False),
    ],
)
def test_what_is_wrong_is_found(change, libraries, words, stops) -> None:
    found = wrong(dataclasses.replace(LAPTOP, **change), Libraries(**libraries))
    assert len(found) == (words != "")
    if found:
        assert words in found[0][0] and found[0][1] is stops


def test_an_optional_package_that_keeps_megatron_core_from_being_imported_is_blamed() -> None:
    reason = "RuntimeError: undefined symbol"
    libraries = Libraries(
        {"megatron-core": reason, "transformer-engine": reason}, {"megatron-core": "transformer-engine"}
    )
    (found,) = findings(GPU_NODE, libraries)
    assert found.stops and found.what.endswith(
        f"because transformer-engine is installed and cannot: {reason}"
    )
    assert found.remedy.endswith("pip uninstall transformer-engine")


def test_the_error_of_a_broken_package_names_it(tmp_path, monkeypatch) -> None:
    """Megatron-Core takes an ImportError only for a package that is missing."""
    (tmp_path / "transformer_engine.py").write_text("raise OSError('undefined symbol\\nsecond line')\n")
    (tmp_path / "imports_it.py").write_text("import transformer_engine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OSError) as caught:
        importlib.import_module("imports_it")
    written = of_exception(3, caught.value, code=1)
    (line,) = written.problems
    assert line.startswith("rank 3: transformer-engine is installed, but cannot be imported (OSError: undefi")
    assert line.endswith("pip uninstall transformer-engine") and "\n" not in line
    assert culprit(OSError("undefined symbol")) is None


def test_what_stops_training_stands_before_what_does_not() -> None:
    machine = dataclasses.replace(LAPTOP, packages={}, open_files=100)
    assert [stops for _, stops in wrong(machine)] == [True, True, False]
    assert report(machine).exit_code == 1
    text = [line.plain for line in lines(report(machine))]
    assert "something is broken" in text[0] and "torch is not installed" in text[1]


def test_fast_paths_follow_the_machine() -> None:
    assert {"bf16 products", "grouped products", "FP8", "NCCL"} <= set(off(LAPTOP))
    volta = dataclasses.replace(GPU_NODE, gpus=(V100,))
    assert off(volta) == ["bf16 products", "grouped products", "packed documents", "FP8", "DeepEP"]
    mixed = dataclasses.replace(GPU_NODE, gpus=(H100, V100))
    assert off(mixed) == off(volta), "the weakest GPU decides"
    bare = dataclasses.replace(GPU_NODE, packages=LAPTOP.packages)
    assert off(bare) == ["Transformer Engine", "FP8", "DeepEP", "apex"]
    assert said_at_start(bare).startswith("Without Transformer Engine, FP8, DeepEP and apex here: ")
    blind = dataclasses.replace(GPU_NODE, torch_cuda=None)
    assert "NCCL" in off(blind), "torch cannot use the GPUs"
    broken = fast_paths(GPU_NODE, {"transformer-engine": "ImportError"})
    assert [path.name for path in broken if not path.on] == ["Transformer Engine", "FP8"]


@pytest.mark.parametrize(
    "machine",
    [
        LAPTOP,
        GPU_NODE,
        dataclasses.replace(GPU_NODE, gpus=(V100,), packages={}, shm_bytes=1, open_files=1),
        dataclasses.replace(LAPTOP, driver="590.44.01", gpu_complaint="Failed to initialize NVML " * 5),
    ],
)
def test_it_fits_one_screen_of_80_columns(machine: Machine) -> None:
    text = [line.plain for line in lines(report(machine))]
    assert max(map(len, text)) <= 80
    assert len(text) <= (60 if machine.open_files == 1 else 40)
    titles = [line for line in text if not line.startswith(" ")]
    assert titles[1:] == ["Versions", "Devices", "Fast paths", "Extras"]
    together = " ".join(" ".join(text).split())
    assert all(path.name in together for path in fast_paths(machine))


def test_a_machine_without_a_gpu_is_told_so_once() -> None:
    text = "\n".join(line.plain for line in lines(report(LAPTOP)))
    assert text.count("-> ") == 2, "a GPU, and the extras"
    assert "pip install 'megatron-moe[all]'" in " ".join(text.split())


def test_the_extras_that_are_missing_are_named() -> None:
    machine = dataclasses.replace(LAPTOP, packages={**LAPTOP.packages, "pyarrow": "26.0", "tiktoken": "0.14"})
    text = " ".join(" ".join(line.plain.split()) for line in lines(report(machine)))
    assert "on parquet, tiktoken off" in text
    assert "pip install 'megatron-moe[zstd,huggingface,tensorboard]'" in text


@pytest.mark.second_pair
def test_the_command_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_moe", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "\x1b" not in done.stdout, "no colours in a pipe"
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert found["machine"]["packages"]["torch"] and found["libraries"]["broken"] == {}
    assert all(path.keys() == {"name", "on", "without", "remedy"} for path in found["fast_paths"])
    assert list(tmp_path.iterdir()) == [], "looking changes nothing"
