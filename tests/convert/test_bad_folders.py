"""What is wrong with a folder is said in one line, and nothing is left of what was begun."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_folders import tensors_of, write_folder

from megatron_moe.cli import main
from megatron_moe.convert import safetensors_writer
from megatron_moe.convert.output import made_aside
from megatron_moe.convert.safetensors_files import SafetensorsFolder
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


NAME = "model.norm.weight"
WRONG_HEADERS: dict[str, object] = {
    "no finite size": {"shape": [float("inf")]},
    "texts": {"data_offsets": ["0", "192"]},
    "nothing": {"data_offsets": [None, 192]},
    "a size that no processor counts to": {"shape": [1 << 70, 0], "data_offsets": [0, 0]},
    "other bytes": {"shape": [47]},
}


@pytest.mark.parametrize("wrong", WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_headers_that_lie(wrong, source, tmp_path, capsys) -> None:
    entry = {"dtype": "F32", "shape": [48], "data_offsets": [0, 192], **wrong}
    header = json.dumps({NAME: entry}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(192))
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert "is no safetensors file" in line and NAME in line


def test_pipes_and_broken_links_are_no_files(source, tmp_path, capsys) -> None:
    file = source / "model.safetensors"
    file.unlink()
    file.symlink_to("nowhere")
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert line == f"{file}: No such file or directory"
    file.unlink()
    os.mkfifo(file)
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert line == f"{file}: is no file"


def test_a_tensor_in_two_files_is_the_one_that_the_index_names(source, tmp_path, capsys) -> None:
    from safetensors.torch import save_file

    weights = tensors_of(source)
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    for file, part in (("a", names[:9]), ("b", names[9:])):
        save_file({name: weights[name] for name in part}, source / f"{file}.safetensors")
    save_file({name: 0 * weights[name] for name in names[:9]}, source / "c.safetensors")
    save_file({names[0]: weights[names[0]]}, source / "d.safetensors")
    places = {name: "a.safetensors" if name in names[:9] else "b.safetensors" for name in names}
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places | {names[1]: "c.safetensors"}}))
    stored = SafetensorsFolder(source)
    assert all(torch.equal(stored.read(name), weights[name]) for name in names if name != names[1])
    assert not stored.read(names[1]).any()
    del places[names[0]]
    index.write_text(json.dumps({"weight_map": places | {names[1]: "d.safetensors"}}))
    lines = refused(capsys, "import", source, tmp_path / "out")
    assert any(f"d.safetensors: holds {names[0]}, and so does a.safetensors" in line for line in lines)


def test_whole_numbers_are_no_weights(source, tmp_path, capsys) -> None:
    from safetensors.torch import save_file

    weights = tensors_of(source)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, source / "model.safetensors")
    (line,) = refused(capsys, "import", source, tmp_path / "out", "--dtype", "fp32")
    assert "model.norm.weight is int8" in line


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"architectures": 5}, "architectures: 5 is no list of names"),
        ({"architectures": "MixtralForCausalLM"}, "is no list of names"),
        ({"architectures": [{}]}, "is no list of names"),
        ({"num_hidden_layers": 10**30}, f"num_hidden_layers: {10**30} is more than 10,000"),
        ({"num_hidden_layers": 9999, "num_local_experts": 99999}, "describes more than"),
        ({"hidden_size": "24"}, "hidden_size: '24' is no whole number"),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
            "has no factor",
        ),
        ({"quantization_config": "fp8"}, "quantization_config: 'fp8' is no section"),
        ({"quantization_config": {"weight_block_size": "ab"}}, "weight_block_size 'ab' is no list"),
    ],
)
def test_a_config_that_makes_no_sense(changed, words, source, tmp_path, capsys) -> None:
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    (line,) = refused(capsys, "import", source, tmp_path / "out")
    assert words in line and "config.json" in line


def test_one_process_at_a_time_writes_a_folder(source, tmp_path, capsys) -> None:
    with made_aside(tmp_path / "out"):
        (line,) = refused(capsys, "import", source, tmp_path / "out")
        assert "another process is writing it right now" in line
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "source"]
    (tmp_path / ".second.partial" / "ready").mkdir(parents=True)  # a killed process left it
    assert main(["import", str(source), str(tmp_path / "second")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "second", "source"]


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
