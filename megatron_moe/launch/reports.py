"""What a rank that fails leaves behind for whoever started it: one small JSON file."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_moe.config.errors import InputError, RunError, is_outside
from megatron_moe.engine import libraries

FOLDER_VARIABLE = "MEGATRON_MOE_REPORTS"
"""Environment variable: the folder that ranks write their reports to."""

Kind = Literal["input", "outside", "error", "secondary", "returned"]

_LOST_CONNECTION = re.compile(
    r"Connection (reset|closed|refused|was likely closed)|Broken pipe|Socket closed"
    r"|recvValue failed|sendBytes failed"
    r"|remote process (exited|has terminated)|ncclRemoteError|[Tt]imed out waiting|[Ww]ait timeout",
)

_TIMED_OUT = re.compile(r"[Tt]imed out waiting|[Ww]ait timeout")
_OUT_OF_MEMORY = re.compile(
    r"^OutOfMemoryError|DefaultCPUAllocator: (can't allocate|not enough) memory|^MemoryError"
)


@dataclass(frozen=True)
class Report:
    """Why a rank ended with another exit code than 0.

    Attributes:
        time: seconds since the epoch.
        kind: `input`, a mistake of the user; `outside`, a RunError; `error`, any other exception;
            `secondary`, one that only says that another rank is gone; `returned`, no exception: the rank's
            function asked for exit code `code` and has said itself why.
        problems: the lines of an InputError or RunError.
    """

    rank: int
    time: float
    kind: Kind
    code: int
    problems: tuple[str, ...] = ()
    traceback: str = ""

    def write(self, folder: Path) -> None:
        """Write the report so that it is there whole or not at all."""
        path = folder / f"rank_{self.rank}.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(asdict(self)))
        os.replace(aside, path)


def of_exception(rank: int, error: BaseException, code: int) -> Report:
    """The report on an exception that ends a rank."""
    if isinstance(error, InputError):
        return Report(rank, time.time(), "input", code, problems=tuple(error.problems))
    if isinstance(error, RunError):
        return Report(rank, time.time(), "outside", code, problems=(str(error),))
    if (line := _known(error)) is not None:
        return Report(rank, time.time(), "outside", code, problems=(f"rank {rank}: {line}",))
    kind: Kind = "secondary" if is_secondary(error) else "error"
    return Report(rank, time.time(), kind, code, traceback="".join(traceback.format_exception(error)))


def _known(error: BaseException) -> str | None:
    """One line for what needs no traceback."""
    # rich makes an exit of a broken pipe.
    left = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(left, BrokenPipeError):
        return "nobody reads the output any more (broken pipe); send it to a file"
    if isinstance(error, OSError) and is_outside(error):
        what = error.filename or "a file of the run"
        return f"cannot write {what}: {error.strerror}; make room and start again"
    if _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
        what = str(error).splitlines()[0]
        return (
            f"out of memory ({what}); a smaller training.micro_batch_size, recompute.layers_per_stage, "
            "or more ranks need less on each"
        )
    return libraries.explanation(error)


def waited_in_vain(report: Report) -> bool:
    """Whether the rank gave up waiting for another one."""
    return report.kind == "secondary" and _TIMED_OUT.search(report.traceback) is not None


def of_code(rank: int, code: int) -> Report:
    """The report of a rank whose function returned `code`."""
    return Report(rank, time.time(), "returned", code)


def is_secondary(error: BaseException) -> bool:
    """Whether an error most likely only follows from another rank's death."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return any(isinstance(cause, ConnectionError) or _LOST_CONNECTION.search(str(cause)) for cause in causes)


def read(folder: Path) -> dict[int, Report]:
    """All reports in a folder, by rank."""
    records = (json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json")))
    reports = (Report(**(record | {"problems": tuple(record["problems"])})) for record in records)
    return {report.rank: report for report in reports}
