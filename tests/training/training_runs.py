"""What tests look at in a run: its metrics and the tensors of its checkpoints."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

TIMES = (
    "step_time_s",
    "tokens_per_second",
    "model_tflops_per_device",
    "moe/communication_ms",
    "moe/exposed_communication_ms",
    "stage/forward_ms",
    "stage/backward_ms",
    "stage/idle_ms",
    "stage/peak_memory_gib",
)
"""What is measured, and so another number each time."""


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what is measured."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def checkpoint(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"iter_{iteration:07d}"


def tensors(folder: Path) -> dict[str, Any]:
    """Everything that Megatron-Core wrote: weights, optimizer state, random states, and the common values."""
    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(str(folder)),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    common = folder / "common.pt"  # Megatron-Core 0.19 keeps these values with the others
    if common.exists():
        state["common"] = torch.load(common, weights_only=False)
    return state


def assert_same(one: Any, other: Any, name: str = "") -> None:
    """Equal to the bit, through all containers."""
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    elif isinstance(one, io.BytesIO):
        load = {"map_location": "cpu", "weights_only": False}
        assert_same(
            torch.load(io.BytesIO(one.getvalue()), **load),
            torch.load(io.BytesIO(other.getvalue()), **load),
            name,
        )
    else:
        assert one == other, name


def copy_until(run: Path, copy: Path, iteration: int) -> Path:
    """A run folder as a machine that failed after `iteration` steps would have left it."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("iter_*"):
        if folder != checkpoint(copy, iteration):
            shutil.rmtree(folder)
    (copy / "checkpoints" / "latest").unlink()
    return copy
