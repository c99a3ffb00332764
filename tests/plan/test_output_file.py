"""Files that `plan` and `profile` write where the user says take no other file's place, and fail at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_moe import cli

CONFIG = """
name: written
extends: [base.yaml]
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, vocab_size: 256}
training: {train_iters: 10, global_batch_size: 8, seq_length: 32}
"""
BASE = "data: {kind: mock}\nextends: deeper.yaml\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "written.yaml").write_text(CONFIG)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "deeper.yaml").write_text("training: {train_iters: 5}\n")
    (tmp_path / "there.svg").mkdir()
    (tmp_path / "link.svg").symlink_to(tmp_path / "base.yaml")
    return tmp_path


@pytest.mark.parametrize(
    "command", ["plan --trace", "plan --plot", "plan --search --gpus 2 --overlay", "profile --output"]
)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("written.yaml", "name another file"),
        ("base.yaml", "name another file"),
        ("deeper.yaml", "name another file"),
        ("link.svg", "name another file"),
        ("there.svg", "is a folder"),
        ("written.yaml/in.svg", "there is no folder"),
    ],
)
def test_nothing_of_the_users_is_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, says: str
) -> None:
    before = {path: path.read_text() for path in folder.glob("*.yaml")}
    verb, *options = command.split()
    assert cli.main([verb, str(folder / "written.yaml"), *options, str(folder / name)]) == 2
    error = capsys.readouterr().err
    assert says in error and options[-1] in error and error.count("\n") == 1, error
    assert before == {path: path.read_text() for path in folder.glob("*.yaml")}


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", ["plan --trace", "profile --output"])
def test_a_folder_without_permission_is_named_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o500)
    verb, option = command.split()
    assert cli.main([verb, str(folder / "written.yaml"), option, str(closed / "file.json")]) == 2
    assert "no permission" in capsys.readouterr().err
