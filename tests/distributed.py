"""Rank processes for tests: started once a session, used by many tests.

`ranks(2).run(function, *arguments)` calls an importable function in 2 processes that are joined over gloo,
and returns what it returned on each. Between calls the processes forget their model-parallel groups, so that
every test may build a layout of its own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing as mp
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 240


class RankError(AssertionError):
    """A function raised on a rank; the message holds its traceback, `kind` the exception's class name."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        super().__init__(f"rank {rank}:\n{text}")
        self.kind = kind


class Ranks:
    """`world_size` processes in one gloo process group."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, port, list(sys.path)), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank; the results by rank. Raises RankError with the first
        rank's error."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                _POOLS.clear()
                raise RankError(rank, "TimeoutError", f"no answer within {TIMEOUT_S} s")
            kind, value = pipe.recv()
            if kind is None:
                results.append(value)
            else:
                errors.append((rank, kind, value))
        if errors:
            # Ranks that wait for one that failed can't be used again.
            self.close()
            _POOLS.clear()
            errors.sort(key=lambda error: "Connection" in error[2] or "gloo" in error[2])
            raise RankError(*errors[0])
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()


_POOLS: dict[int, Ranks] = {}


def ranks(world_size: int) -> Ranks:
    """The session's processes for `world_size`, started at the first call."""
    if world_size not in _POOLS:
        _POOLS[world_size] = Ranks(world_size)
    return _POOLS[world_size]


@atexit.register
def _close_all() -> None:
    for pool in _POOLS.values():
        pool.close()


def _serve(pipe: Connection, rank: int, world_size: int, port: int, path: list[str]) -> None:
    """A rank's loop: receive a function, run it, answer."""
    sys.path[:] = path
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import importlib

    import torch

    from megatron_moe.engine import device as devices
    from megatron_moe.engine import groups

    torch.set_num_threads(1)
    groups.initialize_process_group(devices.start(rank), timeout_s=120)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            pipe.send((None, function(*arguments)))
        except BaseException as error:
            pipe.send((type(error).__name__, traceback.format_exc()))
        finally:
            _forget_models()
            groups.destroy()


def _forget_models() -> None:
    """Take models apart, which cycles through autograd's graph keep alive, and with them their groups'
    threads."""
    from megatron.core.transformer.module import MegatronModule

    # What was taken apart before may still be there.
    models = [
        thing for thing in gc.get_objects() if issubclass(type(thing), MegatronModule) and thing.__dict__
    ]
    for module in {module for model in models for module in model.modules()}:
        module.__dict__.clear()


REPOSITORY = Path(__file__).parent.parent
