"""Threads of a host that each compute pieces of their own.

Where there are many small products, threads that share each of them wait for each other after each; threads
that take whole pieces do not. In Python, because torch releases the interpreter while it computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

MOST_WORKERS = 8
"""More would wait for the interpreter; so many share a larger number of threads."""

Piece = TypeVar("Piece")


def workers() -> int:
    """How many pieces are computed at once where `in_threads` is called."""
    return min(torch.get_num_threads(), MOST_WORKERS)


def in_threads(work: Callable[[Iterator[Piece]], None], pieces: Sequence[Piece]) -> None:
    """Have each worker call `work` with an iterator that hands every piece to one of them, in order. Records
    no gradients. Raises what one of them raises, when all have ended."""
    left, threads, inference = iter(pieces), torch.get_num_threads(), torch.is_inference_mode_enabled()

    def worker() -> None:
        # Modes belong to threads.
        with torch.inference_mode(inference), torch.no_grad():
            work(left)

    pool = _pool(os.getpid(), threads)
    calls = [pool.submit(worker) for _ in range(workers())]
    errors = [call.exception() for call in calls]
    for error in errors:
        if error is not None:
            raise error


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Workers between which torch's threads of the caller are shared out.

    Args:
        process: whose workers they are; a forked process has none.
        threads: of the caller.
    """
    count = workers()
    started = Barrier(count + 1)

    def start() -> None:
        # A thread takes the process' number when it first asks: later it would undo what is set here.
        torch.get_num_threads()
        torch.set_num_threads(threads // count)

    pool = ThreadPoolExecutor(count, thread_name_prefix="experts", initializer=start)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    # It is set for threads that start later, too, and for them it stays as it was.
    torch.set_num_threads(threads)
    return pool
