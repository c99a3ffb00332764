"""The ranks that run on this machine: their meeting point, their environment, their output."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.launch import reports
from megatron_moe.launch.identity import Identity
from megatron_moe.launch.processes import start_bound

STORE_VARIABLE = "MEGATRON_MOE_STORE_FD"
"""Environment variable of rank 0: the listening socket on which it serves the ranks' store."""
LOG_VARIABLE = "MEGATRON_MOE_RANK_LOG"
"""Environment variable: the file that takes what libraries have to say."""


def start(
    argv: Sequence[str],
    world_size: int,
    threads: int,
    report_folder: Path,
    log_folder: Path,
    quiet: bool,
    held: Sequence[int] = (),
) -> list[subprocess.Popen[bytes]]:
    """Start one process a rank. Rank 0 shares our output unless `quiet`; the others write to `log_folder`.

    Nobody else can take the port of their store: it is bound here and handed to rank 0 as an open socket.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, world_size)) as listener:
        port = listener.getsockname()[1]
        for rank in range(world_size):
            environment = _environment(
                Identity(rank, world_size, rank, world_size, "127.0.0.1", port), threads
            )
            environment[reports.FOLDER_VARIABLE] = str(report_folder)
            environment[LOG_VARIABLE] = str(log_of(log_folder, rank))
            sockets = []
            if rank == 0:
                environment[STORE_VARIABLE] = str(listener.fileno())
                sockets = [listener.fileno()]
            with contextlib.ExitStack() as stack:
                log = None
                if rank > 0 or quiet:
                    environment["PYTHONUNBUFFERED"] = "1"
                    log = stack.enter_context(open(log_of(log_folder, rank), "ab"))
                processes.append(start_bound(argv, environment, log, (*held, *sockets)))
    return processes


def log_of(log_folder: Path, rank: int) -> Path:
    """The file that takes the output of a rank."""
    return log_folder / f"rank_{rank}.txt"


def remove_empty_logs(log_folder: Path, world_size: int) -> None:
    """Leave only logs that say something."""
    for path in (log_of(log_folder, rank) for rank in range(world_size)):
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
    with contextlib.suppress(OSError):
        log_folder.rmdir()


def threads_each(world_size: int) -> int:
    """CPU threads for each of `world_size` ranks that share the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // world_size)


def _environment(identity: Identity, threads: int) -> dict[str, str]:
    environment = dict(os.environ) | identity.environment()
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        # The store is served apart from the process group, as by torchrun's agent: `env://` only connects.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    # What the libraries' C++ parts write goes past Python: no file could take it from rank 0.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "lo" in (name for _, name in socket.if_nameindex()):
        # All ranks are here. Gloo would else look this machine up by its name, which need not resolve.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
