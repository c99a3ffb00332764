"""Programs that nobody has read can do nothing but compute."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from megatron_moe.config.errors import InputError
from megatron_moe.inference.sandbox import Limits, Outcome, run

LIMITS = Limits(wall_s=5.0, cpu_s=2, memory_bytes=512 << 20, file_bytes=1 << 20)


try:
    run("", LIMITS)
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)


def outcome(program: str, limits: Limits = LIMITS) -> Outcome:
    return run(program, limits)


def test_a_program_that_ends_has_passed() -> None:
    program = (
        "import collections.abc, math, re, heapq, hashlib\nopen('x', 'w').write('y')\nassert math.pi > 3"
    )
    assert outcome(program) == Outcome(True, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("raise SystemExit(3)", "exit code 3"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import socket; socket.create_connection(('127.0.0.1', 1), timeout=2)", "Network is unreachable"),
        ("x = 'a' * (1 << 30)", "MemoryError"),
        ("open('big', 'wb').write(b'a' * (1 << 22))", "File too large"),
        ("import os; os.kill(os.getppid(), 9)", ""),
        ("import ctypes\nassert ctypes.CDLL(None).umount(b'/proc') == 0", "AssertionError"),
        ("import os; assert os.environ.get('HOME')", "AssertionError"),
        ("import os; [os.fork() for _ in range(20)]", "unavailable"),
    ],
    ids=["wrong", "exit", "syntax", "network", "memory", "file", "kill", "unmount", "environment", "forks"],
)
def test_what_a_program_must_not_do_fails(program: str, reason: str) -> None:
    found = outcome(program)
    assert reason in found.reason and (not found.passed or not reason)


def test_files_of_others_stay_as_they_are(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("as it was")
    mine.chmod(0o666)
    tmp_path.chmod(0o777)
    found = outcome(f"open({str(mine)!r}, 'w').write('mine now')")
    assert not found.passed and mine.read_text() == "as it was"


def test_a_program_that_never_ends_is_ended() -> None:
    assert outcome("while True: pass", Limits(wall_s=5.0, cpu_s=1)).reason.startswith("exit code")
    before = _sandboxes()
    assert outcome("import time; time.sleep(60)", Limits(wall_s=1.0)).reason == "took more than 1 s"
    for _ in range(50):  # its end is not waited for
        if _sandboxes() <= before:
            return
        time.sleep(0.1)
    raise AssertionError("the program outlived its time")


def _sandboxes() -> set[str]:
    """The numbers of the processes that run in a sandbox."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended
            if b"sandbox_child" in path.read_bytes():
                found.add(path.parent.name)
    return found
