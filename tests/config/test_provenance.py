"""`validate --provenance`: every value says where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_files import DENSE, MOE, loaded

from megatron_moe.cli import main
from megatron_moe.config.dump import to_yaml
from megatron_moe.config.loading import Loaded, load


def comments(result: Loaded) -> dict[str, str]:
    """Dotted key of each value -> what stands behind it."""
    found, way = {}, []
    for line in to_yaml(result.experiment, result.provenance).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        way[depth:] = [line.split(":")[0].strip()]
        _, mark, comment = line.partition("  # ")
        if mark:
            found[".".join(way)] = comment
    return found


def test_every_value_says_where_it_came_from(tmp_path: Path) -> None:
    result = loaded(tmp_path, DENSE, "training.seed=3", "model.megatron_core.qk_l2_norm=true")
    found = comments(result)
    assert set(found) == set(result.provenance)
    assert found["training.seed"] == "override"
    assert found["model.megatron_core.qk_l2_norm"] == "override"
    assert found["model.num_layers"] == f"{tmp_path}/experiment.yaml:2"
    assert found["data.tokenizer.kind"] == f"{tmp_path}/experiment.yaml:3"
    assert found["optimizer.lr"] == "default"
    assert found["moe"] == "default"


def test_a_derived_value_names_what_it_follows_from(tmp_path: Path) -> None:
    found = comments(loaded(tmp_path, MOE, "optimizer.lr_warmup_fraction=0.5"))
    assert (
        found["model.kv_channels"] == "derived from multi_latent_attention, hidden_size, num_attention_heads"
    )
    assert found["model.max_position_embeddings"] == "derived from training.seq_length"
    assert found["moe.moe_ffn_hidden_size"] == "derived from model.ffn_hidden_size"
    assert found["optimizer.lr_warmup_iters"] == "derived from lr_decay_iters, lr_warmup_fraction"
    assert found["parallel.expert_tensor_parallel_size"] == "default", "1, whatever the others are"


def test_the_number_of_ranks_is_named_where_it_decides(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(DENSE)
    found = comments(load(tmp_path / "experiment.yaml", world_size=4))
    assert found["parallel.data_parallel_size"].endswith("context_parallel_size, the number of ranks")


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A file over another one over a third."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data.yaml").write_text(
        "data:\n  kind: pretraining\n  prepare:\n    input:\n      - a.txt\n      - b.txt\n"
        "  tokenizer: {kind: bytes}\n  split: [90, 10]\n"
    )
    (tmp_path / "base.yaml").write_text(
        "extends: shared/data.yaml\n"
        "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}\n"
        "training:\n  train_iters: 10\n  seq_length: 64\n  seed: 1\n"
    )
    (tmp_path / "top.yaml").write_text(
        "extends: [base.yaml]\nname: top\n\ntraining:\n  global_batch_size: 8\n  seed: 2\n"
        "data:\n  split: [95, 5]\nmodel:\n  kv_channels:\n"
    )
    return tmp_path


def test_each_file_of_a_chain_is_named_with_its_line(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain)
    found = comments(load("top.yaml", ["training.seq_length=32"]))
    assert found["name"] == "top.yaml:2"
    assert found["training.global_batch_size"] == "top.yaml:5"
    assert found["training.seed"] == "top.yaml:6", "the later file wins"
    assert found["data.split"] == "top.yaml:8"
    assert found["training.train_iters"] == "base.yaml:4"
    assert found["training.seq_length"] == "override"
    assert found["data.kind"] == "shared/data.yaml:2"
    assert found["data.prepare.input"] == "shared/data.yaml:4", "a list is one value"
    assert found["data.prepare.documents"] == "default"
    assert found["model.kv_channels"].startswith("derived"), "null asks for the default"


def test_overrides_of_whole_sections_and_lists(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain)
    found = comments(
        load(
            "top.yaml",
            ["data.prepare.input=[c.txt]", "moe={num_moe_experts: 4}", "data.prepare={json_key: x}"],
        )
    )
    assert found["data.prepare.input"] == found["data.prepare.json_key"] == "override"
    assert found["data.prepare.append_eod"] == "default"
    assert found["moe.num_moe_experts"] == "override"
    assert found["moe.moe_router_topk"] == "default"


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(DENSE)
    assert main(["validate", str(tmp_path / "small.yaml"), "--provenance", "training.seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  # ")[1] for line in lines if "  seed:" in line] == ["override"]
    assert sum(line.endswith("# default") for line in lines) > 20


def test_sections_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sources.yaml").write_text(
        "data:\n  kind: pretraining\n  tokenizer: {kind: bytes}\n  blend:\n"
        "    web:\n      path: web\n      weight: 2\n    books:\n      path: books\n      weight: 1\n"
    )
    (tmp_path / "top.yaml").write_text(
        "extends: sources.yaml\nname: top\n"
        "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}\n"
        "training: {train_iters: 10, global_batch_size: 8, seq_length: 64}\n"
        "data:\n  blend:\n    books:\n      weight: 3\n"
    )
    found = comments(load("top.yaml", ["data.blend.code={path: code, weight: 1}", "data.blend.web.weight=5"]))
    assert found["data.blend.web.path"] == "sources.yaml:6"
    assert found["data.blend.web.weight"] == "override"
    assert found["data.blend.books.path"] == "sources.yaml:9"
    assert found["data.blend.books.weight"] == "top.yaml:8"
    assert found["data.blend.code.path"] == "override"
    assert found["data.blend.code.split"] == "default"
