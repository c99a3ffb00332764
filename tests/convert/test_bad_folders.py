"""What is wrong with a folder is said in one line, and nothing is left of what was begun."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from huggingface_folders import tensors_of, write_folder

from megatron_moe.cli import main
from megatron_moe.convert import safetensors_writer
from megatron_moe.engine import weight_writer


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> list[str]:
    """The lines that a command which fails says."""
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().err.splitlines()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", "mixtral")


def test_all_missing_unexpected_and_misshapen_tensors_are_named(source, tmp_path, capsys) -> None:
    from safetensors.torch import save_file

    weights = tensors_of(source)
    gone = ["model.norm.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    for name in gone:
        del weights[name]
    save_file(weights | {"a.b": torch.ones(2), "c": torch.ones(1)}, source / "model.safetensors")
    lines = refused(capsys, "import", source, tmp_path / "out")
    assert len(lines) == 2
    assert "lacks 2 tensors" in lines[0] and all(name in lines[0] for name in gone)
    assert "holds 2 tensors" in lines[1] and "a.b, c" in lines[1]

    weights = tensors_of(write_folder(tmp_path / "other", "mixtral"))
    for name in ("model.norm.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name]])
    save_file(weights, source / "model.safetensors")
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "model.norm.weight [48]" in line and "lm_head.weight [400" in line
    assert not (tmp_path / "out").exists()


def test_unfinished_downloads(source, tmp_path, capsys) -> None:
    file = source / "model.safetensors"
    whole = file.read_bytes()
    for content, words in (
        (whole[:-10], "download was not finished"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n", "git lfs pull"),
        (b"<html>", "is no safetensors file"),
        (b"", "is no safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "is no safetensors file"),
    ):
        file.write_bytes(content)
        (line,) = refused(capsys, "import", source, tmp_path / "out")
        assert str(file) in line and words in line
    file.unlink()
    index = {"weight_map": {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "lacks 2 of its 2 files" in line and "model-00002-of-00003.safetensors" in line
    index["weight_map"]["a"] = "../model.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "names files that are not in its folder" in line


def test_folders_that_hold_no_model(source, tmp_path, capsys) -> None:
    file = source / "model.safetensors"
    file.rename(source / "pytorch_model.bin")
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "pickle" in line and "save_pretrained" in line
    (source / "pytorch_model.bin").unlink()
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "holds no weights" in line and "gated" in line
    (source / "config.json").write_text('{"architectures": ["FooForCausalLM"]}')
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "FooForCausalLM" in line and "MixtralForCausalLM" in line and "LlamaForCausalLM" in line
    (source / "config.json").unlink()
    for command in ("import", "export"):
        (line,) = refused(capsys, command, source, tmp_path / "out")
        assert "config.json" in line
        (line,) = refused(capsys, command, tmp_path / "nowhere", tmp_path / "out")
        assert "there is no such folder" in line


def test_what_is_there_already_is_not_touched(source, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "is there already" in line
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_leaves_nothing(command, source, tmp_path, capsys, monkeypatch) -> None:
    if command == "export":
        assert main(["import", str(source), str(tmp_path / "ours")]) == 0
        source = tmp_path / "ours"
    before = sorted(tmp_path.iterdir())

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = (weight_writer._Hashed, "write") if command == "import" else (safetensors_writer, "_fill")
    monkeypatch.setattr(*place, full)
    (line,) = refused(capsys, command, source, tmp_path / "out", code=1)
    assert "No space left on device" in line and str(tmp_path / "out") in line
    assert sorted(tmp_path.iterdir()) == before


def test_an_experiment_of_ones_own_must_be_that_model(source, tmp_path, capsys) -> None:
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    mine = tmp_path / "ours" / "experiment.yaml"
    assert main(["import", str(source), str(tmp_path / "second"), "--config", str(mine)]) == 0
    text = mine.read_text()
    assert "rotary_base: 1000000.0" in text and "moe_router_topk: 2" in text
    mine.write_text(text.replace("rotary_base: 1000000.0", "rotary_base: 5e5").replace("topk: 2", "topk: 3"))
    lines = refused(capsys, "import", source, tmp_path / "third", "--config", mine)
    assert len(lines) == 2
    assert any("model.rotary_base: 500000.0" in line and "1000000.0" in line for line in lines)
    assert any("moe.moe_router_topk: 3" in line and "num_experts_per_tok: 2" in line for line in lines)
