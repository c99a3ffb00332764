"""Composition: extends, overrides, provenance, and all mistakes at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_files import DENSE, MOE, loaded, problems

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.loading import load


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_later_files_win_key_by_key_and_lists_replace(tmp_path: Path) -> None:
    write(tmp_path / "bases/one.yaml", MOE + "optimizer: {lr: 1.0, min_lr: 0.5}\ncheckpoint: {keep: 1}\n")
    write(tmp_path / "two.yaml", "optimizer: {lr: 2.0}\ndata: {split: [1, 2, 3]}\n")
    text = "extends: [bases/one.yaml, two.yaml]\nname: mine\ndata: {split: [9, 1]}\ncheckpoint:\n"
    result = loaded(tmp_path, text)
    experiment = result.experiment
    assert (experiment.name, experiment.optimizer.lr, experiment.optimizer.min_lr) == ("mine", 2.0, 0.5)
    assert experiment.data.split == [9.0, 1.0]
    assert experiment.checkpoint.keep == 1, "an empty section sets nothing"
    assert result.text == text
    origins = {key: str(origin).replace(f"{tmp_path}/", "") for key, origin in result.provenance.items()}
    assert origins["name"] == "experiment.yaml:2"
    assert origins["optimizer.lr"] == "two.yaml:1"
    assert origins["optimizer.min_lr"] == "bases/one.yaml:6"
    assert origins["optimizer.adam_eps"] == "default"
    assert origins["model.kv_channels"] == "derived"


def test_every_value_has_an_origin_and_nothing_else_has_one(tmp_path: Path) -> None:
    result = loaded(tmp_path, MOE, "training.seed=7", "model.megatron_core.qk_l2_norm=true")
    assert str(result.provenance["training.seed"]) == "override"
    assert str(result.provenance["model.megatron_core.qk_l2_norm"]) == "override"
    assert {"model", "training"}.isdisjoint(result.provenance)
    assert {
        "model.num_layers",
        "moe.num_moe_experts",
        "parallel.data_parallel_size",
    } <= result.provenance.keys()


def test_input_paths_belong_to_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "data: {kind: pretraining, prepare: {input: [a.txt, /b.txt]}, tokenizer: {kind: bytes}}\n"
    write(tmp_path / "bases/base.yaml", DENSE.replace("data:", "optimizer: {} #") + base)
    text = "extends: bases/base.yaml\n"
    monkeypatch.chdir("/")
    data = loaded(tmp_path, text).experiment.data
    assert data.prepare is not None
    assert data.prepare.input == [str(tmp_path / "bases/a.txt"), "/b.txt"]
    data = loaded(tmp_path, text, "data.prepare.input=[x/../c.txt]", "logging.root=r").experiment.data
    assert data.prepare is not None
    assert data.prepare.input == ["/c.txt"]
    data = loaded(tmp_path, text, "data.prepare=null", "data.path=corpus").experiment.data
    assert data.path == "/corpus"


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("none.yaml", "experiment.yaml:1: extends: none.yaml: there is no such file"),
        ("3", "experiment.yaml:1: extends: must be a file name or a list of them"),
        ("experiment.yaml", "experiment.yaml:1: extends: goes round in a circle"),
        ("loop.yaml", "loop.yaml:1: extends: goes round in a circle"),
        ("broken.yaml", "broken.yaml:1: this is not YAML"),
    ],
)
def test_files_that_cannot_be_extended(tmp_path: Path, extends: str, words: str) -> None:
    write(tmp_path / "loop.yaml", "extends: experiment.yaml\n")
    write(tmp_path / "broken.yaml", "a: [1\n")
    (line,) = problems(tmp_path, f"extends: {extends}\nname: x\n")
    assert line.startswith(words), "and nothing is called missing that the file might have set"


def test_a_file_may_be_extended_along_two_ways(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", DENSE)
    for name in ("left", "right"):
        write(tmp_path / f"{name}.yaml", f"extends: root.yaml\nname: {name}\n")
    assert loaded(tmp_path, "extends: [left.yaml, right.yaml]\n").experiment.name == "right"


def test_overrides_are_yaml_1_2_values(tmp_path: Path) -> None:
    experiment = loaded(
        tmp_path,
        MOE,
        "optimizer.lr=3e-4",
        " training.precision = bf16",
        "pipeline.layers_per_stage=[3, 1]",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=null",
        "model.megatron_core={rotary_interleaved: true}",
        "training.seed=1",
        "training.seed=2",
    ).experiment
    assert experiment.optimizer.lr == 3e-4
    assert experiment.training.precision == "bf16"
    assert experiment.pipeline.layers_per_stage == [3, 1]
    assert experiment.parallel.virtual_pipeline_model_parallel_size == 1
    assert experiment.model.megatron_core == {"rotary_interleaved": True}
    assert experiment.training.seed == 2


def test_an_override_takes_the_experts_away_and_brings_them_back(tmp_path: Path) -> None:
    tp = "parallel.tensor_model_parallel_size=2"
    dense = loaded(tmp_path, MOE, "moe=null", tp).experiment
    assert dense.moe is None
    assert dense.parallel.expert_model_parallel_size == 1
    again = loaded(tmp_path, MOE, "moe=null", "moe.num_moe_experts=4", tp).experiment
    assert again.moe is not None
    assert (again.moe.num_moe_experts, again.parallel.expert_model_parallel_size) == (4, 2)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train_iters=3", "override train_iters: unknown key; did you mean training.train_iters?"),
        (
            "training.trainiters=3",
            "override training.trainiters: unknown key; did you mean training.train_iters?",
        ),
        (
            "model.num_moe_experts=3",
            "override model.num_moe_experts: unknown key; did you mean moe.num_moe_experts?",
        ),
        ("modle.num_layers=3", "override modle.num_layers: unknown key; did you mean model.num_layers?"),
        ("parallel.tp=3", "override parallel.tp: unknown key; parallel has tensor_model_parallel_size, "),
        ("training", "override training: is no assignment; write section.key=value, for example "),
        ("=3", "override =3: is no assignment"),
        ("training.seed=[1", "override training.seed: is not YAML"),
        (
            "training.seed=",
            "override training.seed: must be a whole number from 0 to 4294967295 (null);",
        ),
        ("extends=x.yaml", "override extends: files are composed by the YAML file alone"),
        ("optimizer=null", "override optimizer: must be a section"),
        ("model.megatron_core.=1", "override model.megatron_core.: unknown key"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, line: str) -> None:
    (found,) = problems(tmp_path, MOE, [override])
    assert found.startswith(line)


def test_all_mistakes_are_reported_together_each_at_its_line(tmp_path: Path) -> None:
    text = """\
name: small run
model:
  num_layers: four
  hidden_sise: 64
  num_attention_heads: 6
parallel: {tensor_model_parallel_size: 4}
optimizer: {lr: 1e-3, min_lr: 1}
optimiser: {lr: 3}
data: {kind: mock, tokenizer: {kind: bytes}}
training: {train_iters: 10, global_batch_size: 8.0, seq_length: 64}
"""
    found = problems(tmp_path, text, ["training.sed=3"])
    assert [line.split(": ")[:2] for line in found] == [
        ["experiment.yaml:1", "name"],
        ["experiment.yaml:2", "model.hidden_size"],
        ["experiment.yaml:3", "model.num_layers"],
        ["experiment.yaml:4", "model.hidden_sise"],
        ["experiment.yaml:5", "model.num_attention_heads"],
        ["experiment.yaml:7", "optimizer.min_lr"],
        ["experiment.yaml:8", "optimiser"],
        ["experiment.yaml:10", "training.global_batch_size"],
        ["override training.sed", "unknown key; did you mean training.seed?"],
    ]


def test_a_rule_names_both_keys_their_values_and_lines(tmp_path: Path) -> None:
    text = MOE + "parallel:\n  tensor_model_parallel_size: 3\n"
    found = problems(tmp_path, text, ["model.num_query_groups=2", "parallel.expert_model_parallel_size=1"])
    assert (
        "experiment.yaml:2: model.num_attention_heads: 4 is not divisible by "
        "parallel.tensor_model_parallel_size (3, experiment.yaml:7); "
        "use 3 or 6, or tensor_model_parallel_size 1, 2 or 4" in found
    )
    assert any(line.startswith("override model.num_query_groups: 2 is neither") for line in found)


def test_missing_sections_and_keys(tmp_path: Path) -> None:
    found = problems(tmp_path, "name: x\nmodel:\n  num_layers: 2\n")
    assert found == [
        "experiment.yaml:2: model.hidden_size: is missing; give it a whole number from 1 to 1000000000",
        "experiment.yaml:2: model.num_attention_heads: is missing; "
        "give it a whole number from 1 to 1000000000",
        "experiment.yaml: training: is missing; add the section with "
        "train_iters, global_batch_size, seq_length",
        "experiment.yaml: data.path: is not set, and neither are data.prepare and data.blend; "
        "set one of the three",
        "experiment.yaml: data.tokenizer.model: is not set, and there is no data.prepare to train one on; "
        "set it, or data.tokenizer.kind to bytes",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('model.hidden_size="64"', 'a whole number from 1 to 1000000000 ("64"); write 64 without quotes'),
        ("model.hidden_size=64.0", "a whole number from 1 to 1000000000 (64.0); write 64"),
        ("model.hidden_size=true", "a whole number from 1 to 1000000000 (true); for example 1"),
        ("model.hidden_size=0", "a whole number from 1 to 1000000000 (0); for example 1"),
        ("parallel.sequence_parallel=no", 'true or false ("no"); write false'),
        ("training.precision=BF16", 'one of auto, fp32, bf16 ("BF16"); write bf16'),
        ("optimizer.lr=0", "a number above 0 (0); for example 0.0003"),
        ("optimizer.lr=1,5", 'a number above 0 ("1,5"); for example 0.0003'),
        (
            "training.seed=12,345",
            'a whole number from 0 to 4294967295 ("12,345"); write 12345 without quotes',
        ),
        ("optimizer.lr=.nan", "a number above 0 (NaN); for example 0.0003"),
        ("optimizer.adam_beta1=1", "a number of at least 0 and below 1 (1); for example 0.9"),
        (
            "data.split=[1]",
            "a list of 2 to 3 entries, each a number from 0 to 1e+12 ([1]); for example [95.0, 5.0]",
        ),
        ("training.global_batch_size=8e9", "a whole number from 1 to 10000000 ("),
        ("moe.moe_overlap_degree=100000", "a whole number from 1 to 1000 ("),
        ("model.hidden_size=10000000000", "a whole number from 1 to 1000000000 ("),
        ("moe.moe_ffn_hidden_size=10000000000", "a whole number from 1 to 1000000000 ("),
        ("training.rampup_batch_size=2", "a list of 3 entries, each a whole number of at least 1 (2); for "),
        ("training.rampup_batch_size=[2]", "([2]); for example [1, 1, 1]"),
        ('data.tokenizer.eod=""', 'text that is not empty (""); for example some-name'),
        ("data.split=[1, x]", 'each a number from 0 to 1e+12 (entry 2 is "x")'),
        ("pipeline.layers_per_stage=4", "each a whole number of at least 0, or text (4); write [4]"),
        ("pipeline.layers_per_stage={a: 1}", 'each a whole number of at least 0, or text ({"a": 1})'),
        ("moe.moe_layer_freq=0", "each 0 or 1 (0); for example 1"),
        ("moe.moe_layer_freq=[0, 2, 1, 3]", "each 0 or 1 (entry 2 is 2, entry 4 is 3)"),
        (
            "moe.moe_layer_freq=x",
            "a whole number of at least 1, or a list of one or more entries, each 0 or 1",
        ),
        (
            "name=a b",
            "text of letters, digits, '.', '_' and '-', the first one a letter or digit (\"a b\"); write a-b",
        ),
        ("name=7", 'write "7"'),
        ("moe=8", "a section, its keys indented below it (8); see configs/quickstart.yaml"),
        ("model.megatron_core=[1]", "a mapping of names to values ([1])"),
        ('logging.root=""', "text that is not empty"),
    ],
)
def test_mistyped_values_in_plain_words(tmp_path: Path, override: str, words: str) -> None:
    (line,) = problems(tmp_path, MOE, [override])
    assert line.startswith(f"override {override.partition('=')[0]}: must be ")
    assert words in line


def test_whole_numbers_are_taken_where_a_number_is_asked_for(tmp_path: Path) -> None:
    lr = loaded(tmp_path, DENSE, "optimizer.lr=1").experiment.optimizer.lr
    assert (lr, type(lr)) == (1.0, float)


def test_the_experiment_is_frozen(tmp_path: Path) -> None:
    experiment = loaded(tmp_path, DENSE).experiment
    with pytest.raises(ValueError, match="frozen"):
        experiment.training.seed = 3  # type: ignore[misc]


def test_the_error_survives_a_process_boundary(tmp_path: Path) -> None:
    import pickle

    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "none.yaml")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems
