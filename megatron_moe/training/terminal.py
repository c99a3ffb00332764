"""Lines for the user: on the terminal and in log.txt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def say(lines: Sequence[str], log: Path) -> None:
    """Print lines, and add them to the log. For one rank."""
    with log.open("a", encoding="utf-8") as file:
        for line in lines:
            print(line, flush=True)
            print(line, file=file)


def first_line(error: BaseException) -> str:
    """An error of somebody else's in one line: its kind, and the beginning of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
