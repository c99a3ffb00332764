"""How a group of ranks ended, and what of it the user is told: the first error, and nobody else's."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.launch import exit_codes
from megatron_moe.launch.reports import Report, waited_in_vain

_LINES_OF_LOG = 20


@dataclass(frozen=True)
class Exit:
    """The end of one rank.

    Attributes:
        code: as subprocess has it: minus the signal's number where a signal ended it.
        time: seconds since the epoch, as it was noticed.
        ended_by_us: our own signal ended it, which therefore says nothing about what went wrong.
    """

    rank: int
    code: int
    time: float
    ended_by_us: bool


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended.

    Attributes:
        exit_code: see `exit_codes`, or what the ranks' function returned.
        problems: the lines of the first error where that is the user's input, else empty.
        error: the first error in words, with its traceback; empty where there was none.
        stopped: a termination signal or Ctrl-C asked for the end.
    """

    exit_code: int
    problems: tuple[str, ...] = ()
    error: str = ""
    stopped: bool = False


def judge(
    exits: Sequence[Exit], reports: Mapping[int, Report], logs: Mapping[int, Path], stopped: bool
) -> Outcome:
    """The outcome of ranks that have all ended.

    Args:
        logs: the files that hold the ranks' output, for ranks whose output the user has not seen.
    """
    failed = [
        end
        for end in exits
        if end.code not in (exit_codes.DONE, exit_codes.START_AGAIN) and not end.ended_by_us
    ]
    if not failed:
        again = any(end.code == exit_codes.START_AGAIN for end in exits)
        # A rank that our signal ended had not come to the point where it would save on it.
        early = stopped and any(end.code == -signal.SIGTERM for end in exits)
        killed = any(end.code == -signal.SIGKILL for end in exits)
        code = exit_codes.DONE
        if killed:
            code = exit_codes.FAILED
        elif again or early:
            code = exit_codes.START_AGAIN
        return Outcome(code, stopped=stopped)

    first = min(failed, key=lambda end: _order(end, reports.get(end.rank)))
    report = reports.get(first.rank)
    if report is None:
        return Outcome(exit_codes.FAILED, error=_unreported(first, logs.get(first.rank)), stopped=stopped)
    if report.kind == "input":
        return Outcome(exit_codes.WRONG_INPUT, problems=report.problems, stopped=stopped)
    if report.kind == "outside":
        return Outcome(exit_codes.FAILED, error="\n".join(report.problems), stopped=stopped)
    if report.kind == "returned":
        return Outcome(report.code, stopped=stopped)
    if waited_in_vain(report):
        return Outcome(exit_codes.FAILED, error=_hung(first.rank, exits, reports), stopped=stopped)
    return Outcome(
        exit_codes.FAILED, error=f"rank {first.rank} failed:\n{report.traceback.rstrip()}", stopped=stopped
    )


def _hung(waiting: int, exits: Sequence[Exit], reports: Mapping[int, Report]) -> str:
    """A rank waited in vain: name those that said nothing until we ended them."""
    silent = [str(end.rank) for end in exits if end.ended_by_us and end.rank not in reports]
    who = f"rank {', '.join(silent)} did not answer" if silent else "no rank says why"
    return (
        f"rank {waiting} waited longer than resilience.collective_timeout_s for the others, and {who}. "
        "If they only need longer, set it higher."
    )


def _order(end: Exit, report: Report | None) -> tuple[bool, float, int]:
    """Sorts causes before consequences, then by time."""
    secondary = report is not None and report.kind == "secondary"
    return secondary, report.time if report else end.time, end.rank


def _unreported(end: Exit, log: Path | None) -> str:
    """A rank that ended without saying why, with the end of its output."""
    if end.code < 0:
        number = -end.code
        text = f"rank {end.rank} was killed by signal {number} ({_name(number)})"
        if number == signal.SIGKILL:
            text += (
                "\nThis is what the kernel does when the machine's memory is full. "
                "A smaller training.micro_batch_size or fewer ranks on this machine need less."
            )
    else:
        text = f"rank {end.rank} ended with exit code {end.code} and did not say why"
    lines = log.read_text(errors="replace").splitlines()[-_LINES_OF_LOG:] if log and log.exists() else []
    return "\n".join([text, f"The end of its output, {log}:", *lines] if lines else [text])


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "real-time signal"
