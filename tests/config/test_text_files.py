"""Folders and globs of text: which files they stand for, in which order, and what validate says of them."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
from experiment_files import DENSE, loaded

from megatron_moe.config.errors import InputError
from megatron_moe.config.input_files import missing_files
from megatron_moe.config.text_files import expand


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder as people have them: some text, some other files, some hidden ones."""
    root = tmp_path / "web"
    names = "b.jsonl a.txt sub/c.parquet sub/deep/d.txt.zst README.md .hidden.txt .git/x.txt z/UPPER.TXT"
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    return root


def under(root: Path, *inputs: str) -> list[str]:
    found = expand([str(root / entry) if entry else str(root) for entry in inputs])
    return [path.removeprefix(f"{root}/") for path in found]


def test_a_folder_stands_for_all_known_files_below_it_by_path(tree: Path) -> None:
    assert under(tree, "") == ["a.txt", "b.jsonl", "sub/c.parquet", "sub/deep/d.txt.zst", "z/UPPER.TXT"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a.txt", "b.jsonl"]),
        ("**/*.txt", ["a.txt"]),
        ("**/*.zst", ["sub/deep/d.txt.zst"]),
        ("**", ["a.txt", "b.jsonl", "sub/c.parquet", "sub/deep/d.txt.zst", "z/UPPER.TXT"]),
        ("[ab].*", ["a.txt", "b.jsonl"]),
        ("sub/?.parquet", ["sub/c.parquet"]),
    ],
)
def test_a_glob_stands_for_the_known_files_that_it_matches_by_path(
    tree: Path, pattern: str, expected: list[str]
) -> None:
    assert under(tree, pattern) == expected


def test_entries_keep_their_order(tree: Path) -> None:
    assert under(tree, "sub", "a.txt", "*.jsonl") == [
        "sub/c.parquet",
        "sub/deep/d.txt.zst",
        "a.txt",
        "b.jsonl",
    ]


def test_a_name_that_exists_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "[1]").mkdir()
    for name in ("[1]/[a].txt", "[1]/b.txt"):
        (tmp_path / name).write_text("text")
    assert under(tmp_path, "[1]/[a].txt") == ["[1]/[a].txt"]
    assert under(tmp_path, "[1]") == ["[1]/[a].txt", "[1]/b.txt"]
    assert under(tmp_path, "[1]/*.txt") == ["[1]/[a].txt", "[1]/b.txt"]


def test_links_are_followed_but_not_around_in_circles(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.txt").write_text("text")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "sub" / "up").symlink_to(tree)
    assert "linked/e.txt" in under(tree, "")
    assert len(under(tree, "")) == 6
    (tree / "sub" / "itself").symlink_to(tree / "sub")
    assert under(tree, "**/*.txt") == ["a.txt", "linked/e.txt"]
    assert under(tree, "**/deep/*") == ["sub/deep/d.txt.zst"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readable = os.listdir

    def listdir(folder: str) -> list[str]:
        if folder.rstrip("/").endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return readable(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    for entry in ("", "**/*.txt", "sub/deep/*"):
        with pytest.raises(InputError, match=r"sub/deep/?: cannot read the folder: Permission denied"):
            under(tree, entry)
    assert under(tree, "*.txt") == ["a.txt"]


def test_what_stands_for_no_file_is_named(tree: Path) -> None:
    (tree / "empty" / ".x").mkdir(parents=True)
    with pytest.raises(InputError) as raised:
        expand([str(tree / entry) for entry in ("empty", "*.md", "none/*")])
    folder, others, nothing = raised.value.problems
    assert folder.startswith(f"{tree}/empty: no file in this folder") and ".parquet" in folder
    assert re.search(r"matches no file of a known type, only others such as .*README\.md; ", others)
    assert "none/*: this glob matches no file; " in nothing


def test_a_file_that_two_entries_stand_for_is_named(tree: Path) -> None:
    with pytest.raises(
        InputError, match=r"a\.txt: both .*/\*\.txt and .*a\.txt stand for it; leave one"
    ) as raised:
        expand([str(tree / "*.txt"), str(tree / "a.txt"), str(tree / "sub")])
    assert len(raised.value.problems) == 1
    with pytest.raises(InputError, match="leave one"):
        expand([str(tree), str(tree / "sub")])
    with pytest.raises(InputError, match="leave one"):
        expand([str(tree / "sub"), f"{tree}/./sub/c.parquet"])
    assert len(expand([str(tree / "a.txt")] * 2)) == 2, "said twice, it is meant"


def test_validate_takes_folders_and_globs_and_names_the_key_of_those_without_a_file(
    tree: Path, tmp_path: Path
) -> None:
    text = DENSE.replace(
        "kind: mock, ", f"prepare: {{input: [{tree}, {tmp_path}/none/*.txt, {tree}/README.md]}}, "
    )
    lines = missing_files(loaded(tmp_path, text))
    assert [line.split(": names ")[0].rpartition(" ")[2] for line in lines] == ["data.prepare.input"] * 2
    assert "none/*.txt: this glob matches no file; names have to end in" in lines[0]
    assert "README.md: unknown type of input; its name has to end in" in lines[1]
    assert missing_files(loaded(tmp_path, text, f"data.prepare.input=['{tree}/**/*.txt', {tree}/sub]")) == []


def test_validate_names_the_package_that_is_missing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = DENSE.replace("kind: mock, ", f"prepare: {{input: [{tree}]}}, ")
    lines = missing_files(loaded(tmp_path, text))
    assert [line.split("; ")[1] for line in lines] == [
        "pip install 'megatron-moe[zstd]'" if "zstandard" in line else "pip install 'megatron-moe[parquet]'"
        for line in lines
    ]
    assert len(lines) == 2 and all("data.prepare.input" in line for line in lines)


def test_validate_finds_a_tokenizer_without_an_end_of_document(tmp_path: Path) -> None:
    tokens = {
        "model": {"type": "BPE", "vocab": {"a": 0}},
        "added_tokens": [{"id": 1, "content": "<eos>", "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    text = DENSE.replace("{kind: bytes}", f"{{kind: huggingface, model: {tmp_path}}}")
    (line,) = missing_files(loaded(tmp_path, text))
    assert "data.tokenizer.eod: needed, as nothing beside" in line and line.endswith("it has: <eos>")
    (line,) = missing_files(loaded(tmp_path, text, "data.tokenizer.eod=<end>"))
    assert 'data.tokenizer.eod: "<end>"' in line and "has no token '<end>'" in line
    assert missing_files(loaded(tmp_path, text, "data.tokenizer.eod=<eos>")) == []
