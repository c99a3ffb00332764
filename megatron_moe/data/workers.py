"""Processes that work on the pieces of an input, while this one keeps their order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron_moe.config.errors import RunError
from megatron_moe.engine.worker_pool import live_with_parent

_BYTES_A_WORKER = 8 << 20
"""Input below this is not worth another process."""

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")


def default_workers(total_bytes: int) -> int:
    """One a core, and fewer for little input."""
    return max(1, min(len(os.sched_getaffinity(0)), total_bytes // _BYTES_A_WORKER))


def in_order(work: Callable[[_Given], _Result], pieces: Iterator[_Given], workers: int) -> Iterator[_Result]:
    """`work` of each piece, in their order. It travels to the workers once.

    RunError where one dies.
    """
    if workers == 1:
        yield from map(work, pieces)
        return
    # Spawned, because a fork of a process with threads (a progress bar, torch) may hang.
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[_Result]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work,)) as pool:
        try:
            for piece in pieces:
                pending.append(pool.submit(_run, piece))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise RunError("a worker process died, perhaps for want of memory; try fewer workers") from None
        finally:
            for future in pending:
                future.cancel()


_work: Callable[[Any], Any]


def _start(work: Callable[[Any], Any]) -> None:
    """Set up a worker process, which keeps its work."""
    global _work
    _work = work
    live_with_parent()


def _run(piece: Any) -> Any:
    return _work(piece)
