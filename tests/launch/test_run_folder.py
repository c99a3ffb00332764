"""Who may write to a run folder, and what becomes of it when nobody can."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from fake_ranks import PACKAGE_ROOT, is_alive, pids_of, start_launcher

from megatron_moe.config.errors import InputError, RunError
from megatron_moe.launch.run_folder import open_locked


def test_files_lie_where_the_contract_says(tmp_path):
    locked = open_locked(str(tmp_path / "runs"), "first")
    locked.folder.write("name: first\n", "name: first # resolved\n", "{}\n")
    names = {path.name for path in (tmp_path / "runs" / "first").iterdir() if not path.name.startswith(".")}
    assert names == {"config.yaml", "resolved.yaml", "plan.json"}
    assert (tmp_path / "runs" / "first" / "config.yaml").read_text() == "name: first\n"


def test_a_second_job_is_refused_and_told_who_is_there(tmp_path):
    locked = open_locked(str(tmp_path), "run")
    with pytest.raises(InputError) as refusal:
        open_locked(str(tmp_path), "run")
    (line,) = refusal.value.problems
    assert f"process {os.getpid()} on {socket.gethostname()}" in line
    assert "\n" not in line
    locked.release()
    open_locked(str(tmp_path), "run").release()


def test_other_runs_under_the_same_root_are_free(tmp_path):
    first, second = open_locked(str(tmp_path), "one"), open_locked(str(tmp_path), "two")
    first.release()
    second.release()


def test_the_lock_lasts_as_long_as_a_rank(tmp_path):
    """Ranks of a killed launcher may still write: only when they are gone the run may be started again."""
    program = f"""
import subprocess, sys
from megatron_moe.launch.run_folder import open_locked
locked = open_locked({str(tmp_path)!r}, "run")
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=[locked.descriptor])
print(rank.pid, flush=True)
"""
    environment = os.environ | {"PYTHONPATH": PACKAGE_ROOT}
    launcher = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    launcher.wait()
    assert is_alive(rank)
    open_locked(str(tmp_path), "run").release()
    assert not is_alive(rank)
    launcher.stdout.close()


def test_a_run_whose_launcher_was_killed_starts_again(tmp_path):
    before = f"""
from megatron_moe.launch.run_folder import open_locked
held = [open_locked({str(tmp_path)!r}, "run").descriptor]
"""
    launcher = start_launcher(tmp_path, "started(); time.sleep(600)", before=before)
    pids_of(tmp_path)
    with pytest.raises(InputError, match=f"process {launcher.pid} on"):
        open_locked(str(tmp_path), "run")
    launcher.kill()
    launcher.communicate()
    open_locked(str(tmp_path), "run").release()


def _race(root: str, results: multiprocessing.Queue) -> None:
    try:
        open_locked(root, "run")
        results.put("got it")
        time.sleep(1)
    except InputError:
        results.put("refused")


def test_of_many_jobs_started_at_once_one_gets_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    jobs = [context.Process(target=_race, args=(str(tmp_path), results)) for _ in range(8)]
    for job in jobs:
        job.start()
    outcomes = sorted(results.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join()
    assert outcomes == ["got it"] + ["refused"] * 7


@pytest.mark.parametrize("root", ["{tmp}/file", "{tmp}/file/deeper", "/proc/runs"])
def test_a_root_that_cannot_be_written_names_the_key(tmp_path, root):
    (tmp_path / "file").touch()
    root = root.format(tmp=tmp_path)
    with pytest.raises(InputError, match=re.escape(f"logging.root: {root}: cannot write")) as refusal:
        open_locked(root, "run")
    (line,) = refusal.value.problems
    assert "logging.root=/" in line


def test_a_run_folder_that_cannot_be_made_leaves_no_parents_behind(tmp_path):
    with pytest.raises(InputError):
        open_locked(str(tmp_path / "a" / "b"), "x" * 300)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written_leave_nothing_half_written(tmp_path):
    locked = open_locked(str(tmp_path), "run")
    locked.folder.plan.with_name("plan.json.part").symlink_to("/dev/full")
    with pytest.raises(
        RunError, match=r"cannot write to the run folder .*No space left on device; make room"
    ):
        locked.folder.write("name: run\n", "name: run\n", "{}")
    assert [path.name for path in locked.folder.path.iterdir()] == [".lock"]
    locked.release()


def test_discarding_removes_what_was_made_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    open_locked(str(tmp_path / "mine" / "runs"), "run").discard()
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and not list((tmp_path / "mine").iterdir())

    locked = open_locked(str(tmp_path / "runs"), "old")
    locked.folder.write("", "", "")
    locked.release()
    open_locked(str(tmp_path / "runs"), "old").discard()
    assert (tmp_path / "runs" / "old" / "config.yaml").exists()
