"""What happens to ranks, and what the user is told, when one of them ends otherwise than it should."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from fake_ranks import is_alive, pids_of, rank_program, start_launcher, wait_until

from megatron_moe.launch import reports
from megatron_moe.launch.outcome import Outcome
from megatron_moe.launch.supervisor import run_ranks

HANGS = "time.sleep(600)"


@pytest.fixture(autouse=True)
def _package_is_found(monkeypatch):
    from fake_ranks import PACKAGE_ROOT

    monkeypatch.setenv("PYTHONPATH", PACKAGE_ROOT)


def run(here: Path, body: str, world_size: int = 2, quiet: bool = True) -> Outcome:
    return run_ranks(rank_program(here, body), world_size, 1, here / "logs", quiet)


def test_all_done_leaves_no_logs(tmp_path):
    assert run(tmp_path, "") == Outcome(0)
    assert not (tmp_path / "logs").exists()


def test_each_rank_knows_who_it_is_and_where_to_meet(tmp_path):
    body = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
print(*(os.environ[name] for name in names))
"""
    assert run_ranks(rank_program(tmp_path, body), 2, 3, tmp_path / "logs", quiet=True).exit_code == 0
    for rank in range(2):
        text = (tmp_path / "logs" / f"rank_{rank}.txt").read_text()
        assert text == f"{rank} {rank} 2 2 127.0.0.1 3\n"


def test_the_port_is_served_by_the_socket_that_rank_0_was_given(tmp_path):
    """Another rank may connect before rank 0 is there, and nobody else can take the port."""
    body = """
import socket
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0:
    try:
        socket.create_server(address)
        report(AssertionError("the port was free to take"))
    except OSError:
        pass
    wait_for("connected")
    connection, _ = socket.socket(fileno=int(os.environ["MEGATRON_MOE_STORE_FD"])).accept()
    connection.sendall(b"hello")
else:
    assert "MEGATRON_MOE_STORE_FD" not in os.environ
    connection = socket.create_connection(address)
    (here / "connected").touch()
    assert connection.recv(5) == b"hello"
"""
    assert run(tmp_path, body) == Outcome(0)


def test_the_first_error_is_shown_and_the_others_are_taken_down(tmp_path):
    body = f"""
started()
if rank == 2:
    wait_for("started_0"); wait_for("started_1")
    report(ValueError("the cause"))
{HANGS}
"""
    outcome = run(tmp_path, body, world_size=3)
    assert outcome.exit_code == 1
    assert outcome.error.startswith("rank 2 failed:\nTraceback")
    assert outcome.error.endswith("ValueError: the cause")
    assert not any(is_alive(pid) for pid in pids_of(tmp_path, 3))


def test_a_lost_connection_is_not_the_cause_even_if_it_is_seen_first(tmp_path):
    body = """
if rank == 0:
    report(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3333"))
time.sleep(0.3)
report(ValueError("the cause"))
"""
    assert run(tmp_path, body).error.endswith("ValueError: the cause")


def test_of_two_causes_the_earlier_one_is_shown(tmp_path):
    body = """
if rank == 0:
    wait_for("second"); time.sleep(0.05); report(ValueError("the consequence"))
(here / "second").touch()
report(ValueError("the cause"))
"""
    assert run(tmp_path, body).error.endswith("ValueError: the cause")


def test_a_lost_connection_alone_is_shown(tmp_path):
    outcome = run(tmp_path, "report(ConnectionResetError('Connection reset by peer'))")
    assert outcome.exit_code == 1
    assert "Connection reset by peer" in outcome.error


def test_a_rank_that_hangs_is_named_without_a_traceback(tmp_path):
    body = """
if rank == 1:
    time.sleep(600)
report(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"))
"""
    outcome = run(tmp_path, body)
    assert outcome.exit_code == 1 and outcome.error.count("\n") == 0
    assert "rank 0 waited longer than resilience.collective_timeout_s" in outcome.error
    assert "rank 1 did not answer" in outcome.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ('OSError(28, "No space left on device")', "cannot write a file of the run: No space left on device"),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried 9 bytes")', "out of memory"),
        ("BrokenPipeError(32, 'Broken pipe')", "nobody reads the output"),
    ],
)
def test_what_needs_no_traceback_is_one_line(tmp_path, error, words):
    outcome = run(tmp_path, f"report({error})", world_size=1)
    assert (outcome.exit_code, outcome.error.count("\n")) == (1, 0)
    assert outcome.error.startswith("rank 0: ") and words in outcome.error


def test_an_exit_that_rich_makes_of_a_broken_pipe_is_one_line_too():
    exit_of_rich = SystemExit(1)
    exit_of_rich.__context__ = BrokenPipeError(32, "Broken pipe")
    (line,) = reports.of_exception(0, exit_of_rich, code=1).problems
    assert line.startswith("rank 0: nobody reads the output")


def test_input_errors_are_their_lines_and_exit_code_2(tmp_path):
    outcome = run(tmp_path, "report(InputError('data.path: gone', 'data.split: empty'), code=2)")
    assert outcome == Outcome(2, problems=("data.path: gone", "data.split: empty"))


def test_a_killed_rank_is_named_with_a_hint(tmp_path):
    body = f"""
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
{HANGS}
"""
    outcome = run(tmp_path, body)
    assert outcome.exit_code == 1
    assert outcome.error.startswith("rank 1 was killed by signal 9 (SIGKILL)")
    assert "memory" in outcome.error


def test_a_kill_comes_before_the_lost_connections_it_causes(tmp_path):
    body = """
if rank == 0:
    report(RuntimeError("Connection reset by peer"))
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(tmp_path, body).error.startswith("rank 1 was killed by signal 9 (SIGKILL)")


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path):
    body = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
started()
if rank == 0:
    wait_for("started_1")
    report(ValueError("the cause"))
{HANGS}
"""
    assert run(tmp_path, body).error.endswith("ValueError: the cause")
    assert not any(is_alive(pid) for pid in pids_of(tmp_path))


def test_a_rank_that_cannot_say_why_shows_the_end_of_its_output(tmp_path):
    outcome = run(tmp_path, "print('on the way'); import nowhere_to_be_found")
    assert outcome.exit_code == 1
    assert "rank 0 ended with exit code 1" in outcome.error
    assert "on the way" in outcome.error and "No module named 'nowhere_to_be_found'" in outcome.error


def test_75_needs_every_rank_to_have_stopped_that_way(tmp_path):
    assert run(tmp_path, "time.sleep(0.2 * rank); os._exit(75)").exit_code == 75
    assert run(tmp_path, "os._exit(75 if rank else 0)").exit_code == 75
    assert run(tmp_path, "os._exit(75) if rank else report(ValueError('no'))").exit_code == 1


def test_a_code_that_the_function_returned_is_passed_on_without_words(tmp_path):
    body = """
reports.of_code(rank, 1).write(Path(os.environ[reports.FOLDER_VARIABLE]))
os._exit(1)
"""
    assert run(tmp_path, body) == Outcome(1)


def test_what_a_rank_left_running_is_ended(tmp_path):
    """Its standard output would stay open: whoever reads it would wait for ever."""
    body = """
import subprocess
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(here / f"worker_{rank}").write_text(str(worker.pid))
os._exit(0)
"""
    assert run(tmp_path, body).exit_code == 0
    workers = [int((tmp_path / f"worker_{rank}").read_text()) for rank in range(2)]
    wait_until(lambda: not any(is_alive(pid) for pid in workers))  # killed, which takes a moment


def test_only_the_first_rank_writes_to_the_terminal(tmp_path):
    launcher = start_launcher(tmp_path, "print('from rank', rank)")
    output, errors = launcher.communicate()
    assert (launcher.returncode, output, errors.strip()) == (0, "from rank 0\n", "")
    assert (tmp_path / "logs" / "rank_1.txt").read_text() == "from rank 1\n"
    assert not (tmp_path / "logs" / "rank_0.txt").exists()


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path):
    launcher = start_launcher(tmp_path, f"signal.signal(signal.SIGTERM, signal.SIG_IGN); started()\n{HANGS}")
    pids = pids_of(tmp_path)
    assert all(os.getpgid(pid) == launcher.pid for pid in pids)
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


SAVES = """
def save(*_):
    time.sleep(0.3 * (1 + rank))
    (here / f"saved_{rank}").touch()
    os._exit(75)
signal.signal(signal.SIGTERM, save)
started()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_lets_every_rank_save(tmp_path, number):
    launcher = start_launcher(tmp_path, SAVES)
    pids_of(tmp_path)
    launcher.send_signal(number)
    _, errors = launcher.communicate()
    assert launcher.returncode == 75
    assert errors.strip() == "STOPPING"
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_ctrl_c_in_the_terminal_reaches_ranks_only_through_the_launcher(tmp_path):
    """The terminal sends SIGINT to the whole group: ranks must not die of it in the middle of a step."""
    launcher = start_launcher(tmp_path, SAVES)
    pids_of(tmp_path)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.communicate()
    assert launcher.returncode == 75
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_a_second_ctrl_c_ends_ranks_at_once(tmp_path):
    body = f"""
signal.signal(signal.SIGTERM, lambda *_: (here / f"told_{{rank}}").touch())
started()
while True:
    {HANGS}
"""
    launcher = start_launcher(tmp_path, body)
    pids = pids_of(tmp_path)
    launcher.send_signal(signal.SIGINT)
    wait_until(lambda: (tmp_path / "told_0").exists() and (tmp_path / "told_1").exists())
    launcher.send_signal(signal.SIGINT)
    launcher.communicate()
    assert launcher.returncode == 1
    assert not any(is_alive(pid) for pid in pids)


def test_an_error_while_stopping_is_not_taken_for_a_save(tmp_path):
    body = f"""
signal.signal(signal.SIGTERM, lambda *_: report(OSError("disk is full")) if rank else os._exit(75))
started()
{HANGS}
"""
    launcher = start_launcher(tmp_path, body)
    pids_of(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate()
    assert launcher.returncode == 1
    assert "OSError: disk is full" in errors
