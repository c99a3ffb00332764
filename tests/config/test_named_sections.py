"""Sections that the user names, `data.blend.<name>`: all that works for other keys works for theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from experiment_files import loaded, problems

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.input_files import missing_files
from megatron_moe.config.loading import load
from megatron_moe.config.resume import differences

BLEND = """\
name: small
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}
training: {train_iters: 10, global_batch_size: 8, seq_length: 64}
data:
  tokenizer: {kind: bytes}
  blend:
    web: {path: data/web, weight: 0.7}
    books:
      prepare: {input: [books.txt], documents: line}
      weight: [0.3, 1]
"""


def test_values_paths_and_places(tmp_path: Path) -> None:
    found = loaded(
        tmp_path, BLEND, "data.blend.web.weight=0.5", "data.blend.more.path=/x", "data.blend.more.weight=1"
    )
    blend = found.experiment.data.blend
    assert blend is not None and list(blend) == ["web", "books", "more"]
    assert (blend["web"].weight, blend["books"].weight) == (0.5, [0.3, 1])
    assert blend["web"].path == f"{tmp_path}/data/web"
    assert blend["books"].prepare is not None and blend["books"].prepare.input == [f"{tmp_path}/books.txt"]
    kinds = {
        key: str(found.provenance[f"data.blend.{key}"]) for key in ("web.path", "web.weight", "web.epochs")
    }
    assert kinds == {
        "web.path": f"{tmp_path}/experiment.yaml:7",
        "web.weight": "override",
        "web.epochs": "default",
    }


def test_what_is_written_down_reads_back_the_same(tmp_path: Path) -> None:
    experiment = loaded(tmp_path, BLEND).experiment
    (tmp_path / "resolved.yaml").write_text(to_yaml(experiment))
    assert load(tmp_path / "resolved.yaml").experiment == experiment


def test_a_base_is_merged_source_by_source(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BLEND)
    text = "extends: [base.yaml]\ndata:\n  blend:\n    web: {weight: 2}\n    code: {path: code, weight: 1}\n"
    blend = loaded(tmp_path, text).experiment.data.blend
    assert blend is not None
    assert {name: source.weight for name, source in blend.items()} == {"web": 2, "books": [0.3, 1], "code": 1}
    assert blend["web"].path == f"{tmp_path}/data/web"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["data.blend.web.weigth=1"],
            "override data.blend.web.weigth: unknown key; did you mean data.blend.web.weight?",
        ),
        (["data.blend.web.prepare.inputs=[a]"], "did you mean data.blend.web.prepare.input?"),
        (["data.blend.web.lr=1"], "override data.blend.web.lr: unknown key; did you mean optimizer.lr?"),
        (["data.blend.web.weight=-1"], "override data.blend.web.weight: must be a number from 0 to 1e.12"),
        (["data.blend.web.weight=1e300"], r"number from 0 to 1e.12, or a list of these \(1e.300\)"),
        (["data.blend.web=3"], "override data.blend.web: must be a section"),
        (["data.blend=3"], "override data.blend: must be sections by name"),
        (["data.blend={}"], None),
        (
            ["data.blend={a b: {path: x, weight: 1}}"],
            'override data.blend: must give each section a name .*"a b".*write a-b',
        ),
        (["data.blend.wbe.weight=1"], "data.blend.wbe.path: is not set, .* or did you mean data.blend.web?"),
    ],
)
def test_mistakes(tmp_path: Path, overrides: list[str], line: str | None) -> None:
    found = problems(tmp_path, BLEND, overrides)
    if line is None:
        assert found == []
        return
    assert len(found) == 1
    assert re.search(line.replace("?", r"\?"), found[0]), found


def test_missing_files_are_named_by_source(tmp_path: Path) -> None:
    lines = missing_files(loaded(tmp_path, BLEND))
    assert [line.replace(f"{tmp_path}/", "").partition(";")[0] for line in lines] == [
        "experiment.yaml:7: data.blend.web.path: names data/web.bin, and there is no such file",
        "experiment.yaml:7: data.blend.web.path: names data/web.idx, and there is no such file",
        "experiment.yaml:9: data.blend.books.prepare.input: names books.txt, and there is no such file",
    ]


def test_resume_lets_files_move_but_no_weight_change(tmp_path: Path) -> None:
    before = loaded(tmp_path, BLEND).experiment
    moved = loaded(tmp_path, BLEND, "data.blend.web.path=/elsewhere", "data.blend.web.weight=0.8").experiment
    for old in (before, before.model_dump()):
        allowed, refused = differences(old, moved)
        assert [key for key, _, _ in allowed] == ["data.blend.web.path"]
        assert refused == [("data.blend.web.weight", 0.7, 0.8)]


def test_the_example_of_the_docs_is_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(data:\n  blend:\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    experiment = loaded(tmp_path, BLEND.partition("data:")[0] + example, "model.vocab_size=2048").experiment
    assert experiment.data.blend is not None and len(experiment.data.blend) == 3
