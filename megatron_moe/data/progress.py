"""How far reading the inputs is: a bar on a terminal, otherwise one line at the end. Both on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def reading_progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Hands out a function to call with the bytes read so far."""
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    if not console.is_terminal:
        yield lambda bytes_read: None
        console.print(f"{title}: {decimal(total_bytes)} in {time.monotonic() - start:.1f} s")
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda bytes_read: bar.update(task, completed=bytes_read)
        bar.update(task, completed=total_bytes)
