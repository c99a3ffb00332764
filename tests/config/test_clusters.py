"""`launch.cluster`: what a preset gives, and what this machine is taken for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from experiment_files import DENSE, loaded, problems

from megatron_moe.config.clusters import PRESETS, this_machine
from megatron_moe.config.clusters.preset import Preset
from megatron_moe.config.clusters.this_machine import Host
from megatron_moe.config.defaults import fill
from megatron_moe.config.schema import Cluster

PRESET = "launch.cluster.preset"
HOST = Host(cores=16, clock_ghz=2.0, flags=frozenset({"avx2", "avx512f"}), memory_bytes=64 * 2**30)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_every_key(tmp_path: Path, name: str) -> None:
    cluster = loaded(tmp_path, DENSE, f"{PRESET}={name}").experiment.launch.cluster
    assert all(getattr(cluster, key) is not None for key in Cluster.model_fields)


@pytest.mark.parametrize(
    ("overrides", "peak"),
    [
        (["training.precision=bf16"], 989.0),
        ([], 989.0),
        (["training.precision=fp32"], 67.0),
        (["training.precision=bf16", "training.fp8=e4m3", "model.spec=transformer_engine"], 1979.0),
        (["launch.cluster.peak_tflops=500"], 500.0),
    ],
    ids=["bf16", "auto", "fp32", "fp8", "given"],
)
def test_the_peak_is_that_of_the_precision(tmp_path: Path, overrides: list[str], peak: float) -> None:
    assert loaded(tmp_path, DENSE, f"{PRESET}=h100", *overrides).experiment.launch.cluster.peak_tflops == peak


def test_provenance_says_what_a_figure_follows_from(tmp_path: Path) -> None:
    provenance = loaded(tmp_path, DENSE, f"{PRESET}=a800").provenance
    key = "launch.cluster.peak_tflops"
    assert provenance[key].behind(key).startswith("derived from preset")
    assert provenance["launch.cluster.memory_gib"].keys[0] == PRESET


def test_what_is_filled_stays(tmp_path: Path) -> None:
    """A filled experiment fills to itself: the figures in resolved.yaml are those of the machine that wrote
    it."""
    experiment = loaded(tmp_path, DENSE, "launch.cluster.memory_gib=0.5").experiment
    assert fill(experiment) == experiment
    assert experiment.launch.cluster.reserved_gib == 0, "the user says what there is for the model"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("memory_gib=0", "must be a number from 1e-06 to 1e+09"),
        ("peak_tflops=-1", "must be a number from 1e-06 to 1e+09"),
        ("peak_tflops=1e300", "must be a number from 1e-06 to 1e+09"),
        ("intra_node_latency_us=-1", "must be a number from 0 to 1e+09"),
        ("network_fraction=1e-300", "must be a number from 1e-06 to 1"),
        ("matrix_padding=1e300", "must be a whole number from 0 to 100000"),
        ("achievable_fraction=1.5", "must be"),
        ("gpus_per_node=0", "must be"),
        ("preset=a1000", "a100"),
    ],
)
def test_impossible_figures_are_named(tmp_path: Path, override: str, words: str) -> None:
    found = problems(tmp_path, DENSE, [f"launch.cluster.{override}"])
    assert len(found) == 1
    assert f"launch.cluster.{override.partition('=')[0]}: " in found[0]
    assert words in found[0]


def test_gpus_are_known_by_their_names() -> None:
    """Counted, too: a node need not have 8."""
    known = this_machine.preset(ranks=4, gpu_names=("NVIDIA H200", "NVIDIA H200"))
    assert known.gpus_per_node == 2
    assert known.memory_bandwidth_gb_s == PRESETS["h200"].memory_bandwidth_gb_s
    names = {
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A800-SXM4-80GB": "a800",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA B200": "b200",
        "NVIDIA H800": "h800",
        "Some GPU that is not known": "a100",
    }
    for name, preset in names.items():
        found = this_machine.preset(ranks=1, gpu_names=(name,) * 8)
        assert found == PRESETS[preset], name


def test_ranks_share_a_host() -> None:
    """16 cores of 2 GHz with 64 fp32 operations a cycle (AVX-512, two fused units) are 2.048 TFLOP/s."""
    alone, fourth = (this_machine.preset(ranks, gpu_names=(), host=HOST) for ranks in (1, 4))
    assert alone.peak_fp32_tflops == pytest.approx(2.048)
    assert fourth.peak_fp32_tflops == pytest.approx(0.512)
    assert (alone.memory_gib, fourth.memory_gib) == (64.0, 16.0)
    assert fourth.gpus_per_node == 4
    assert alone.peak_bf16_tflops < alone.peak_fp32_tflops, "without units for bf16"


def test_units_for_bf16_count() -> None:
    amx = Host(HOST.cores, HOST.clock_ghz, HOST.flags | {"amx_bf16"}, HOST.memory_bytes)
    assert this_machine.preset(1, (), amx).peak_bf16_tflops == pytest.approx(16 * 2.0 * 1.024)


def test_a_system_that_tells_nothing_is_planned_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc, no /sys: every figure but the memory has a default."""
    monkeypatch.setattr(this_machine, "_text", lambda file: "")
    host = this_machine.look.__wrapped__()
    assert host.cores >= 1 and host.memory_bytes is None
    found = this_machine.preset(ranks=2, gpu_names=(), host=host)
    assert found.memory_gib is None
    assert all(
        getattr(found, field.name) is not None
        for field in fields(Preset)
        if field.name not in ("memory_gib", "peak_fp8_tflops")
    )


def test_this_host_is_seen() -> None:
    host = this_machine.look()
    assert host.cores >= 1 and 0.1 < host.clock_ghz < 10
