"""What YAML text means: scalars of YAML 1.2, lines, duplicates, and text that is no YAML."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from experiment_files import DENSE, problems

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.loading import load
from megatron_moe.config.yaml_tree import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-.inf", -math.inf),
        ("0x1F", 31),
        ("0o17", 15),
        ("012", 12),
        ("+3", 3),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("2026-11-22", "2026-11-22"),
        ("1:30", "1:30"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("[1, [2.5, a], {b: null}]", [1, [2.5, "a"], {"b": None}]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = parse(f"key: {text}", "f.yaml").values["key"]
    assert read == value
    assert type(read) is type(value)


def test_every_duplicate_key_is_found_with_both_lines(tmp_path: Path) -> None:
    text = DENSE + "optimizer:\n  lr: 1\n  min_lr: 0\n  lr: 2\nname: again\n"
    assert problems(tmp_path, text) == [
        "experiment.yaml:8: optimizer.lr: is there twice (first in line 6); keep one of them",
        "experiment.yaml:9: name: is there twice (first in line 1); keep one of them",
    ]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "experiment.yaml: the file is empty"),
        ("# only a comment\n", "experiment.yaml: the file is empty"),
        ("- a\n- b\n", "experiment.yaml:1: the file must hold sections"),
        ("just text", "experiment.yaml:1: the file must hold sections"),
        ("name: a\nmodel: [1, 2\n", "experiment.yaml:2: this is not YAML"),
        ("name: a\n\tmodel: 3\n", "experiment.yaml:2: this is not YAML"),
        ("name: 'a\n", "experiment.yaml:1: this is not YAML"),
        ("name: a\n---\nname: b\n", "experiment.yaml:2: this is not YAML"),
        ("name: *unknown\n", "experiment.yaml:1: this is not YAML"),
        ("name: \x00\n", "experiment.yaml: this is not YAML"),
        ("name: " + "[" * 3000, "experiment.yaml: this is not YAML: its brackets or sections are nested"),
    ],
)
def test_text_that_is_no_experiment_is_one_line(tmp_path: Path, text: str, start: str) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(start)
    assert "\n" not in line


def test_a_key_that_is_no_word_and_an_unknown_tag(tmp_path: Path) -> None:
    found = problems(tmp_path, DENSE + "3: x\noptimizer: {lr: !money 3}\n")
    assert any(line.startswith("experiment.yaml:5:") and "a key must be a word (3)" in line for line in found)
    assert any(
        line.startswith("experiment.yaml:6: optimizer.lr: the tag !money is not known") for line in found
    )


@pytest.mark.parametrize("text", ["9" * 5000, "!!int many", "!!float few"])
def test_what_cannot_be_read_as_a_number_is_one_line(tmp_path: Path, text: str) -> None:
    found = problems(tmp_path, DENSE + f"optimizer: {{clip_grad: {text}}}\n", [f"optimizer.clip_grad={text}"])
    starts = ("experiment.yaml:5: optimizer.clip_grad: ", "override optimizer.clip_grad: ")
    for start in starts:
        (line,) = (line for line in found if line.startswith(start) and "cannot be read as a number" in line)
        assert len(line) < 200


def test_an_infinite_number_is_not_proposed(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, DENSE + "optimizer: {lr: .inf}\n")
    assert "inf" not in line.partition("(Infinity)")[2]


def test_numbers_beyond_what_torch_takes_are_refused_with_the_exact_bound(tmp_path: Path) -> None:
    found = problems(tmp_path, DENSE, [f"training.seed={2**32}", "resilience.collective_timeout_s=100000000"])
    assert any("training.seed" in line and "to 4294967295 " in line for line in found)
    assert any("collective_timeout_s" in line and "to 31536000 " in line for line in found)
    assert problems(tmp_path, DENSE, [f"training.seed={2**32 - 1}"]) == []


def test_a_value_that_contains_itself_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, DENSE + "optimizer: &o {lr: *o}\n")
    assert any("refers to itself" in line for line in found)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00name")
    for path, words in (
        (tmp_path / "none.yaml", "there is no such file"),
        (tmp_path, "is a folder"),
        (binary, "is not text"),
        (tmp_path / ("x" * 300), "cannot be read"),
        ("\x00", "cannot be read"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(path)
        (line,) = caught.value.problems
        assert words in line


def test_a_nul_in_a_text_is_named_with_its_key(tmp_path: Path) -> None:
    found = problems(tmp_path, DENSE, ['logging.root="a\\0b"'])
    assert found == ["override logging.root: holds the character \\0; take it out"]
