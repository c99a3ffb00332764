"""Where a host's large tensors get their memory from."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.engine import allocator

FAULTS_OF_LARGE_TENSORS = """
import resource
import torch
from megatron_moe.engine import allocator, device

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{start}

for _ in range(3):
    before = faults()
    torch.zeros(8 << 20)
print(faults() - before)
"""
SMALL_PAGES = (32 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults_of_a_tensor(start: str, **environment: str) -> int:
    """Page faults of one of 32 MiB, in a process of its own, made and freed before."""
    # What earlier tests of this process set is not the child's.
    inherited = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_LARGE_TENSORS.format(start=start)],
        capture_output=True,
        text=True,
        check=True,
        env=inherited | environment,
    )
    return int(done.stdout)


def mallopt_is_there() -> bool:
    return hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.second_pair
@pytest.mark.skipif(
    not allocator._allowed() or not mallopt_is_there(), reason="the system has no huge pages for us"
)
def test_large_tensors_come_in_huge_pages():
    assert faults_of_a_tensor("device.start(0)") < SMALL_PAGES / 4


def test_the_environment_may_forbid_it():
    assert faults_of_a_tensor("allocator.use_huge_pages()", THP_MEM_ALLOC_ENABLE="0") >= SMALL_PAGES


def test_nothing_changes_where_torch_has_decided_already():
    # Thresholds for huge pages would make small ones dearer.
    assert faults_of_a_tensor("torch.zeros(1)\nassert not allocator.use_huge_pages()") >= SMALL_PAGES


@pytest.mark.parametrize("switch", ["always madvise [never]\n", None])
def test_systems_without_huge_pages_are_left_alone(switch, tmp_path: Path, monkeypatch):
    path = tmp_path / "enabled"
    if switch is not None:
        path.write_text(switch)
    monkeypatch.setattr(allocator, "_SWITCH", path)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert not allocator.use_huge_pages()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_allowed", lambda: True)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert not allocator.use_huge_pages()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ
