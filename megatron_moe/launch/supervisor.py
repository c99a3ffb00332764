"""Runs ranks on this machine: starts them, watches them, and takes all down when one fails.

Nothing here knows what the ranks do, and nothing imports torch.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.launch import exit_codes, local_ranks, reports
from megatron_moe.launch.outcome import Exit, Outcome, judge
from megatron_moe.launch.processes import end_leftovers
from megatron_moe.launch.stop_request import StopRequest

_POLL_S = 0.05
_SETTLE_S = 1.0
"""From the first failure until the others are told to end: time to write down what they saw of it."""
_GRACE_S = 4.0
"""From then until they are killed."""


def run_ranks(
    argv: Sequence[str],
    world_size: int,
    threads: int,
    log_folder: Path,
    quiet: bool,
    held: Sequence[int] = (),
    stop_message: str = "",
) -> Outcome:
    """Run `argv` once a rank and wait for all of them.

    Call from the main thread. While it runs, SIGTERM, SIGHUP and Ctrl-C are passed on as SIGTERM, on which
    ranks may save and exit with 75; a second Ctrl-C kills them.

    Args:
        threads: CPU threads a rank.
        log_folder: takes the output of each rank but the first; the folder is made.
        quiet: it takes that of the first rank too.
        held: file descriptors that stay open as long as any rank lives.
        stop_message: said when a signal comes.
    """
    # Before anything runs, so that a signal in between is not lost.
    with StopRequest(stop_message) as stop, tempfile.TemporaryDirectory(prefix="megatron-moe-") as reports_at:
        report_folder = Path(reports_at)
        processes = local_ranks.start(argv, world_size, threads, report_folder, log_folder, quiet, held)
        try:
            exits = _watch(processes, stop)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            end_leftovers(f"{reports.FOLDER_VARIABLE}={reports_at}", grace_s=_SETTLE_S)
        first = 0 if quiet else 1
        logs = {rank: local_ranks.log_of(log_folder, rank) for rank in range(first, world_size)}
        outcome = judge(exits, reports.read(report_folder), logs, stop.requested)
    local_ranks.remove_empty_logs(log_folder, world_size)
    return outcome


def _watch(processes: Sequence[subprocess.Popen[bytes]], stop: StopRequest) -> list[Exit]:
    """Wait for all ranks, ending them where it has to be."""
    running = dict(enumerate(processes))
    exits: list[Exit] = []
    sent: dict[int, set[int]] = {rank: set() for rank in running}
    first_failure: float | None = None

    def send(number: int) -> None:
        for rank, process in running.items():
            if number not in sent[rank]:
                process.send_signal(number)
                sent[rank].add(number)

    while True:
        for rank, process in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[rank]
                exits.append(Exit(rank, code, time.time(), ended_by_us=-code in sent[rank]))
        if not running:
            return exits
        if first_failure is None and any(
            end.code not in (exit_codes.DONE, exit_codes.START_AGAIN) for end in exits
        ):
            first_failure = time.monotonic()

        waited = time.monotonic() - first_failure if first_failure is not None else 0.0
        if stop.insisted or waited > _SETTLE_S + _GRACE_S:
            send(signal.SIGKILL)
        elif stop.requested or waited > _SETTLE_S or any(end.code == exit_codes.START_AGAIN for end in exits):
            # Without a time limit as long as nothing failed: saving takes as long as it takes.
            send(signal.SIGTERM)
        time.sleep(_POLL_S)
