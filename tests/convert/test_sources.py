"""A run that starts from a Hugging Face folder: what is said where the experiment is another model, what of
the folder it keeps, and that it computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sources_on_ranks as on_ranks
import torch
from distributed import ranks
from safetensors.torch import save_file
from tiny_families import LENGTH, tiny

from megatron_moe.cli import main
from megatron_moe.config.loading import load
from megatron_moe.launch import starting

SOURCE = tiny("mixtral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it."""
    place = tmp_path_factory.mktemp("models") / "mixtral"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(SOURCE.config))
    (place / "tokenizer.json").write_text("{}")
    save_file(
        {name: weight.contiguous() for name, weight in SOURCE.weights.items()}, place / "model.safetensors"
    )
    return place


def written(folder: Path, at: Path) -> Path:
    """An experiment with this model, in a file."""
    config = at / "experiment.yaml"
    sections = {
        "name": "tiny",
        **SOURCE.family.sections(SOURCE.config),
        "data": {"kind": "mock"},
        "training": {"train_iters": 1, "global_batch_size": 2, "micro_batch_size": 2, "seq_length": LENGTH},
        "checkpoint": {"initialize_from": str(folder)},
    }
    config.write_text(json.dumps(sections))
    return config


def test_every_key_that_makes_another_model_is_named_with_both_values(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = written(folder, tmp_path)
    changes = ["model.hidden_size=48", "model.rotary_base=5e4", "moe.moe_router_topk=1"]
    assert main(["train", str(config), *changes, "moe.moe_router_pre_softmax=true"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines if "disagrees" in line]
    for key, mine, theirs in (
        ("model.hidden_size", 48, 24),
        ("moe.moe_router_topk", 1, SOURCE.config["num_experts_per_tok"]),
    ):
        (line,) = (line for line in lines if f"{key}: {mine} " in line)
        assert f"checkpoint.initialize_from ({json.dumps(str(folder))[:20]}" in line
        assert f"set it to {theirs}" in line
    assert any("model.rotary_base: 50000.0 " in line for line in lines)
    assert not (tmp_path / "runs").exists()


def test_what_is_no_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["train", str(written(empty, tmp_path)), f"logging.root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"checkpoint.initialize_from: {empty}: is no model" in error
    assert main(["validate", str(written(tmp_path / "gone", tmp_path))]) == 2
    assert "there is no such folder; name a folder with a model" in capsys.readouterr().err


def test_the_run_folder_keeps_what_came_with_the_model(folder: Path, tmp_path: Path) -> None:
    came_with = starting.check(load(written(folder, tmp_path)))
    assert came_with == folder
    starting.keep(came_with, tmp_path)
    kept = tmp_path / "huggingface"
    assert {path.name for path in kept.iterdir()} == {"config.json", "tokenizer.json"}
    assert (kept / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 1}],
    ids=["alone", "TP2"],
)
def test_the_first_loss_is_that_of_transformers(
    folder: Path, tmp_path: Path, parallel: dict[str, int]
) -> None:
    config = load(written(folder, tmp_path), [f"parallel.{key}={value}" for key, value in parallel.items()])
    found = ranks(2 if parallel else 1).run(on_ranks.first_loss, config.experiment, tmp_path / "run")
    loss, tokens, labels = found[0]
    assert tokens.shape == (2, LENGTH)
    with torch.no_grad():
        logits = SOURCE.model(tokens, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss == pytest.approx(float(expected), abs=1e-4)
