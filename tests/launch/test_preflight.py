"""What a machine lacks is said before ranks start, and only there; the machines here are made by hand."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.cli import main
from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import Loaded, load
from megatron_moe.config.one_process import in_one_process
from megatron_moe.engine.machine import Gpu, Machine
from megatron_moe.launch import preflight

EXPERIMENT = """\
name: small
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}
moe: {num_moe_experts: 4}
parallel: {tensor_model_parallel_size: 2}
data: {kind: mock, tokenizer: {kind: bytes}}
training: {train_iters: 2, global_batch_size: 4, seq_length: 64}
"""
TE, APEX, DEEP_EP = "transformer_engine", "fused_weight_gradient_mlp_cuda", "deep_ep"
SPEC = "model.spec=transformer_engine"
PERMUTE = ["moe.moe_permute_fusion=true", "moe.overlap_moe_expert_parallel_comm=true"]
HOST = Machine()
HOPPER = Machine(gpus=(Gpu("H100", 80 * 2**30, (9, 0)),) * 2, torch_cuda="12.8")
AMPERE = Machine(gpus=(HOPPER.gpus[0], Gpu("A100", 80 * 2**30, (8, 0))), torch_cuda="12.8")
BLACKWELL = Machine(gpus=(Gpu("B200", 180 * 2**30, (10, 0)),), torch_cuda="12.8")

KEYS: dict[str, tuple[list[str], str | None]] = {
    # what is set -> the package that it needs
    "model.spec": ([SPEC], TE),
    "model.apply_rope_fusion": (["model.apply_rope_fusion=true"], TE),
    "moe.moe_permute_fusion": (PERMUTE, TE),
    "moe.moe_token_dispatcher_type": (["moe.moe_token_dispatcher_type=flex"], DEEP_EP),
    "recompute.cpu_offloading_num_layers": ([SPEC, "recompute.cpu_offloading_num_layers=2"], TE),
    "optimizer.use_precision_aware_optimizer": (["optimizer.use_precision_aware_optimizer=true"], TE),
    "optimizer.optimizer_cpu_offload": (["optimizer.optimizer_cpu_offload=true"], None),
    "training.fp8": ([SPEC, "training.fp8=hybrid"], TE),
    "training.gradient_accumulation_fusion": (["training.gradient_accumulation_fusion=true"], APEX),
}

Install = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Calling it with versions by module makes these the only ones of the optional packages."""
    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def install(**versions: str | None) -> None:
        def found(name: str, package: str | None = None) -> Any:
            return versions.keys() & {name} or None if name in (TE, APEX, DEEP_EP) else find_spec(name)

        def of(name: str) -> str:
            if name in versions and versions[name] is not None:
                return str(versions[name])
            return version(name)

        monkeypatch.setattr(importlib.util, "find_spec", found)
        monkeypatch.setattr(importlib.metadata, "version", of)

    install()
    return install


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT + f"logging: {{root: {tmp_path / 'runs'}}}\n")
    return path


def lacks(loaded: Loaded, machine: Machine) -> list[str]:
    try:
        preflight.check(loaded, machine)
    except InputError as error:
        return error.problems
    return []


@pytest.mark.parametrize("key", KEYS)
def test_what_each_key_needs(installed: Install, file: Path, key: str) -> None:
    overrides, package = KEYS[key]
    loaded = load(file, overrides)

    def of_key(machine: Machine) -> list[str]:
        return [line for line in lacks(loaded, machine) if line.startswith(f"override {key}: ")]

    if package is not None:
        (line,) = of_key(HOPPER)
        assert f"needs the package {package}" in line and "which is not installed here; " in line
        assert ", or leave it out" in line or ", or set it to native" in line or ", or use alltoall" in line
    installed(**{name: "9.9" if name == TE else None for name in (TE, APEX, DEEP_EP)})
    (line,) = of_key(HOST)
    assert "needs a GPU" in line and "there is none here; start it on a machine with a GPU" in line
    (line,) = of_key(Machine(gpus=HOPPER.gpus))
    assert "the torch that is installed here was built without CUDA" in line
    assert lacks(loaded, HOPPER) == []


def test_without_such_keys_nothing_is_looked_at(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "look", lambda: pytest.fail("the machine was looked at"))
    preflight.check(load(file))


@pytest.mark.parametrize(
    ("recipe", "machine", "words"),
    [
        ("delayed", HOPPER, ""),
        ("delayed", AMPERE, "a GPU of compute capability 8.9 or higher, and the A100 here has 8.0"),
        ("blockwise", HOPPER, ""),
        ("mxfp8", HOPPER, "a GPU of compute capability 10.0 or higher, and the H100 here has 9.0"),
        ("mxfp8", BLACKWELL, ""),
    ],
)
def test_fp8_needs_units_for_it(
    installed: Install, file: Path, recipe: str, machine: Machine, words: str
) -> None:
    installed(transformer_engine="2.9")
    loaded = load(file, [SPEC, "training.fp8=e4m3", f"training.fp8_recipe={recipe}"])
    found = lacks(loaded, machine)
    assert len(found) == bool(words)
    assert not words or words in found[0]


def test_an_old_transformer_engine(installed: Install, file: Path) -> None:
    installed(transformer_engine="2.0.0+abc")
    loaded = load(file, ["model.apply_rope_fusion=true", *PERMUTE])
    (line,) = lacks(loaded, HOPPER)
    assert (
        "moe.moe_permute_fusion: true needs transformer_engine 2.1 or newer, and 2.0.0+abc is installed"
        in line
    )


def test_commands_on_a_machine_without_it(
    installed: Install, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`validate` and `plan` work, `train` and `verify` refuse; no run folder is left."""
    monkeypatch.setattr(preflight, "look", lambda: HOST)
    for command in ("validate", "plan"):
        assert main([command, str(file), SPEC]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        note = "# It cannot run on this machine as it is: override model.spec: "
        assert (note in said.out) is (command == "validate")
    for command in ("train", "verify"):
        assert main([command, str(file), SPEC]) == 2
        package, gpu = capsys.readouterr().err.splitlines()
        assert package == (
            'override model.spec: "transformer_engine" needs the package transformer_engine, which is '
            "not installed here; pip install --no-build-isolation 'transformer-engine[pytorch]', "
            "or set it to native"
        )
        assert gpu.startswith('override model.spec: "transformer_engine" needs a GPU, and there is none here')
    assert not (file.parent / "runs" / "small").exists()


def test_verify_compares_the_flex_dispatcher_with_one_process_that_has_none(file: Path) -> None:
    flex = ["moe.moe_token_dispatcher_type=flex", "moe.moe_flex_dispatcher_backend=hybridep"]
    reference = load(file, [*flex, *in_one_process(load(file, flex).experiment)]).experiment
    assert reference.moe is not None and reference.moe.moe_token_dispatcher_type == "alltoall"


def test_verify_compares_what_travels_with_one_process_where_nothing_does(file: Path) -> None:
    sends = ["parallel.tensor_model_parallel_size=4", "moe.moe_ranks_per_node=2", "moe.moe_overlap_degree=2"]
    reference = load(file, [*sends, *in_one_process(load(file, sends).experiment)]).experiment
    assert reference.moe is not None and reference.moe.moe_ranks_per_node is None
