"""A checkpoint is complete or not there, wherever its writer dies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_moe.engine import checkpoint_folders as folders


def write(run: Path, iteration: int, content: str = "tensors") -> Path:
    aside = folders.begin(run, iteration)
    (aside / "a.distcp").write_text(f"{content} {iteration}")
    (aside / ".metadata").write_text("names")
    hashes = {path.name: folders.sha256(path) for path in aside.iterdir()}
    return folders.commit(aside, run, iteration, hashes)


def latest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def test_the_newest_is_named_and_the_oldest_go(tmp_path):
    for iteration in (2, 4, 10_000_000, 6):
        write(tmp_path, iteration)
    assert [folders.iteration_of(path) for path in folders.complete(tmp_path)] == [2, 4, 6, 10_000_000]
    assert folders.newest(tmp_path) == folders.folder_of(tmp_path, 10_000_000)
    assert latest(tmp_path) == "iter_0000006"
    folders.keep_newest(tmp_path, 2)
    assert [folders.iteration_of(path) for path in folders.all_of(tmp_path)] == [6, 10_000_000]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_run_without_checkpoints(tmp_path):
    assert folders.complete(tmp_path) == [] and folders.newest(tmp_path) is None


class Died(BaseException):
    """The process is gone at this point: nothing behind it runs."""


CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open", "write_text")


def die_at(call: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From here on the process dies before its `call`-th change of the disk. Returns those it made."""
    made: list[str] = []

    def counted(name: str, function):
        def wrapper(*arguments, **keywords):
            if len(made) == call:
                raise Died
            made.append(name)
            return function(*arguments, **keywords)

        return wrapper

    for name in CALLS[:-1]:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(Path, "write_text", counted("write_text", Path.write_text))
    monkeypatch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    monkeypatch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
    return made


def test_every_point_at_which_a_writer_can_die(tmp_path):
    """Three checkpoints are there, the fourth is written and the oldest one removed."""
    deaths = 0
    while True:
        run = tmp_path / str(deaths)
        for iteration in (1, 2, 3):
            write(run, iteration)
        with pytest.MonkeyPatch.context() as monkeypatch:
            made = die_at(deaths, monkeypatch)
            try:
                write(run, 4)
                folders.keep_newest(run, 3)
                finished = True
            except Died:
                finished = False
        there = [folders.iteration_of(path) for path in folders.complete(run)]
        # Never less than three whole ones, and no folder that is not whole passes for one.
        assert there in ([1, 2, 3], [1, 2, 3, 4], [2, 3, 4]), (made, there)
        assert folders.all_of(run) == folders.complete(run), made
        for path in folders.complete(run):
            assert folders.damaged(path, folders.files_of(path)) == []
        assert latest(run) in ("iter_0000003", "iter_0000004")
        assert (run / "checkpoints" / latest(run)).is_dir()
        # The next writer is not in its way.
        write(run, 5)
        assert latest(run) == "iter_0000005"
        assert not list((run / "checkpoints").glob(".iter*")), made
        if finished:
            break
        deaths += 1
    assert deaths > 12, "the points were not counted"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda at: (at / "a.distcp").write_text("tens"), "a.distcp has 4 of 9 bytes"),
        (lambda at: (at / "a.distcp").unlink(), "a.distcp: No such file or directory"),
        (lambda at: (at / "manifest.json").unlink(), "manifest.json: No such file or directory"),
        (lambda at: (at / "manifest.json").write_text('{"format_v'), "manifest.json is not what was written"),
        (lambda at: (at / "manifest.json").write_text("[1]"), "manifest.json is not what was written"),
        (
            lambda at: (at / "manifest.json").write_text(json.dumps({"format_version": 2, "files": {}})),
            "format version 2, but this program reads 1",
        ),
    ],
)
def test_what_is_damaged_is_seen_and_named(tmp_path, damage, fault):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    assert folders.fault(folders.folder_of(tmp_path, 2)) == fault
    assert [folders.iteration_of(path) for path in folders.complete(tmp_path)] == [1]
    assert len(folders.all_of(tmp_path)) == 2


def test_a_changed_byte_is_found_by_its_hash(tmp_path):
    at = write(tmp_path, 2)
    (at / "a.distcp").write_text("tensorS 2")
    assert folders.fault(at) is None
    assert folders.damaged(at, folders.files_of(at)) == ["a.distcp"]


def test_a_damaged_one_is_kept_under_another_name(tmp_path):
    for content in ("first", "again"):
        kept = folders.set_aside(write(tmp_path, 2, content))
        assert kept.name == "damaged_iter_0000002" and (kept / "a.distcp").read_text() == f"{content} 2"
    assert folders.all_of(tmp_path) == []


def test_folders_of_other_names_are_left_alone(tmp_path):
    write(tmp_path, 1)
    for name in ("iter_0000001_copy", "iter_best", "iter_5"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert len(folders.all_of(tmp_path)) == 1
    folders.keep_newest(tmp_path, 1)
    assert len(list((tmp_path / "checkpoints").glob("iter_*"))) == 4
