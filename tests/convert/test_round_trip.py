"""Imported and exported again, every tensor of every family has the same bytes, whatever wrote the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_folders import tensors_of, write_folder
from tiny_families import CASES, tiny
from torch import Tensor

from megatron_moe.cli import main
from megatron_moe.config.loading import load
from megatron_moe.convert.agreement import disagreements
from megatron_moe.convert.models import open_model
from megatron_moe.engine import checkpoint_folders


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", name)
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert same_bytes(tensors_of(source), tensors_of(tmp_path / "back"))
    before, after = (json.loads((at / "config.json").read_text()) for at in (source, tmp_path / "back"))
    assert after == before | {"dtype": "float32", "torch_dtype": "float32"}
    for file in ("tokenizer_config.json", "README.md"):
        assert (tmp_path / "back" / file).read_text() == (source / file).read_text()
    sections = tiny(name).family.sections(tiny(name).config)
    assert not list(disagreements(load(tmp_path / "ours" / "experiment.yaml").experiment, sections))
    manifest = checkpoint_folders.files_of(tmp_path / "ours")
    assert not checkpoint_folders.damaged(tmp_path / "ours", manifest)


@pytest.mark.second_pair
def test_several_processes_and_small_files_change_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "mixtral")
    assert main(["import", str(source), str(tmp_path / "ours"), "--workers", "2"]) == 0
    arguments = ["export", str(tmp_path / "ours"), str(tmp_path / "back")]
    assert main([*arguments, "--workers", "2", "--max-shard-size", "20KB"]) == 0
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 30_000 for file in files)
    assert same_bytes(tensors_of(source), tensors_of(tmp_path / "back"))
    # Files in several parts come in as well as one.
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    ours, again = open_model(tmp_path / "ours").weights, open_model(tmp_path / "again").weights
    assert all(torch.equal(ours.read(name), again.read(name)) for name in ours.inventory())


def test_precision_is_what_was_asked_for(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "deepseek_v3")
    assert main(["import", str(source), str(tmp_path / "ours"), "--dtype", "bf16"]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "half"), "--dtype", "fp16"]) == 0
    exact, half = tensors_of(source), tensors_of(tmp_path / "half")
    for name, tensor in exact.items():
        balances = name.endswith("e_score_correction_bias")
        assert torch.equal(half[name], tensor if balances else tensor.bfloat16().half())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_transformers_opens_what_is_exported_without_its_config(tmp_path: Path) -> None:
    """The config.json that is written where none came with the model says all that it computes."""
    from transformers import AutoModelForCausalLM

    source = write_folder(tmp_path / "source", "qwen3_moe")
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    (tmp_path / "ours" / "huggingface" / "config.json").unlink()
    manifest = tmp_path / "ours" / checkpoint_folders.MANIFEST
    listed = json.loads(manifest.read_text())
    del listed["files"]["huggingface/config.json"]
    manifest.write_text(json.dumps(listed))
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, tiny("qwen3_moe").model.eval()(tokens).logits)


def test_tied_output_layer_may_lie_there_twice(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = write_folder(tmp_path / "source", "llama, tied, biases, wide heads")
    weights = tensors_of(source)
    twice = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(twice, source / "model.safetensors")
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert same_bytes(weights, tensors_of(tmp_path / "back"))
