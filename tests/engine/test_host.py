"""The stand-ins for torch.cuda: where they are needed, and that they are nowhere else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import host_on_ranks
import pytest
import torch
from distributed import ranks

from megatron_moe.engine import device as devices
from megatron_moe.engine import host
from megatron_moe.engine.stand_ins import exact_norm, not_compiled, on_host

NOT_ON_OUR_WAY = ("inference", "models/multimodal", "models/mimo", "export", "post_training", "ssm")


@cache
def megatron_core_source() -> str:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    root = next(p for folder in spec.submodule_search_locations if (p := Path(folder) / "core").is_dir())
    files = (
        path for path in root.rglob("*.py") if not str(path.relative_to(root)).startswith(NOT_ON_OUR_WAY)
    )
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def current_values() -> list[Any]:
    targets = [stand_in.target for stand_in in host.STAND_INS if stand_in.target.startswith("torch.")]
    return [getattr(*host._resolve(target)) for target in targets]


@pytest.mark.second_pair
@pytest.mark.parametrize("stand_in", host.STAND_INS, ids=lambda stand_in: stand_in.target)
def test_megatron_core_still_makes_the_call(stand_in: host.StandIn) -> None:
    """An entry whose call is gone goes too."""
    assert stand_in.seen_in in megatron_core_source()
    assert stand_in.reason


def test_none_is_installed_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    before = current_values()
    device = devices.start(local_rank=3)
    assert (device.torch_device, device.backend, device.is_host) == (torch.device("cuda", 3), "nccl", False)
    assert chosen == [3]
    with pytest.raises(AssertionError, match="never hide a GPU"):
        host.install()
    assert all(now is then for now, then in zip(current_values(), before, strict=True))


@pytest.mark.second_pair
def test_they_are_installed_once() -> None:
    assert ranks(1).run(host_on_ranks.installed_again) == [[]]


@pytest.mark.second_pair
def test_libraries_can_be_imported_and_say_nothing() -> None:
    """torch's optimizers import its compiler, which goes through the functions of torch.cuda."""
    program = """
from megatron_moe.engine import device
device.start(0)
import torch, torch._dynamo, torch._inductor.config
torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
import megatron.core.dist_checkpointing, megatron.core.distributed, megatron.core.models.gpt
import megatron.core.optimizer, megatron.core.pipeline_parallel
import megatron_moe.model.moe.router
assert torch.overrides._get_current_function_mode_stack() == []
"""
    command = [sys.executable, "-W", "default", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_factories_are_wrapped() -> None:
    """Whatever else is called of torch must cost what it costs."""
    of_torch = {s.target for s in host.STAND_INS if not s.target.startswith(("torch.cuda.", "megatron."))}
    factories = {s.target for s in host.STAND_INS if s.replacement is on_host}
    moved = {"torch.Tensor.cuda", "torch.Tensor.record_stream", "torch.Tensor.type", "torch.compile"}
    assert of_torch == factories | moved


def test_factories_read_cuda_as_the_host() -> None:
    zeros = on_host(torch.zeros)
    for name in ("cuda", "cuda:0", torch.device("cuda")):
        assert zeros(2, device=name, pin_memory=True).device.type == "cpu"
    assert zeros(2, device="meta").device.type == "meta"
    assert zeros(2).equal(torch.zeros(2))


def test_compile_in_all_its_forms() -> None:
    assert not_compiled(len) is len
    assert not_compiled(dynamic=True)(len) is len


@pytest.mark.second_pair
def test_random_states_are_forked() -> None:
    """Tensor-parallel ranks share the default state and have one each to fork; the fork leaves the default
    state alone."""
    first, second = ranks(2).run(host_on_ranks.draws, 2, 1, 7)
    assert first["default"] == second["default"]
    assert first["default after"] == first["default without forks"]
    assert len({tuple(x) for x in (first["fork"], first["next fork"], second["fork"], first["default"])}) == 4
    assert ranks(2).run(host_on_ranks.draws, 2, 1, 7) == [first, second]
    assert ranks(2).run(host_on_ranks.draws, 2, 1, 8)[0]["fork"] != first["fork"]


def test_replicas_draw_apart() -> None:
    first, second = ranks(2).run(host_on_ranks.draws, 1, 2, 7)
    assert first["default"] != second["default"]
    assert first["fork"] != second["fork"]


@pytest.mark.second_pair
@pytest.mark.parametrize("rows", [[3, 1], [0, 4], [2, 2], [0, 0]], ids=str)
def test_parts_of_different_length(rows: list[int]) -> None:
    results = ranks(2).run(host_on_ranks.sizes_differ, rows)
    parts = [host_on_ranks._numbers(size, 10 * (rank + 1)) for rank, size in enumerate(rows)]
    gathered_gradient = sum(host_on_ranks._numbers(sum(rows), 100 * (rank + 1)) for rank in range(2))
    scattered = sum(host_on_ranks._numbers(sum(rows), 1000 * (rank + 1)) for rank in range(2))
    assert isinstance(gathered_gradient, torch.Tensor) and isinstance(scattered, torch.Tensor)
    for rank, result in enumerate(results):
        assert torch.equal(result[0], torch.cat(parts))
        assert torch.equal(result[1], gathered_gradient.split(rows)[rank])
        assert torch.equal(result[2], scattered.split(rows)[rank])
        assert torch.equal(result[3], torch.cat(parts))


def test_the_gradient_norm_of_a_large_vocabulary_is_exact() -> None:
    torch.manual_seed(0)
    gradient = 1e-3 * torch.randn(40_000, 64)
    gradient[:50] += torch.randn(50, 64)
    parts = [gradient[:30_000], gradient[30_000:]]
    expected = float(gradient.double().norm())
    norm, _ = exact_norm(1, torch.zeros(1), [parts], False)
    assert abs(float(norm) / expected - 1) < 1e-6
    assert float(exact_norm(1, torch.zeros(1), [[]], False)[0]) == 0


def test_other_libraries_still_build_on_the_meta_device() -> None:
    """Their models get their tables of frequencies only if nothing has numbers before it is loaded."""
    program = (
        "from megatron_moe.engine import device\n"
        "device.start(0)\n"
        "import torch\n"
        "with torch.device('meta'):\n"
        "    assert {torch.tensor([1.0]).device.type, torch.zeros(2).device.type} == {'meta'}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
