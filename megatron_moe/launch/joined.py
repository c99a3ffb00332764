"""`train` as one rank among others that torchrun or srun started."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError, one_line
from megatron_moe.config.loading import Loaded, load
from megatron_moe.launch import exit_codes, local_ranks, preflight, rank, reports
from megatron_moe.launch.beginning import begin
from megatron_moe.launch.identity import Identity
from megatron_moe.launch.library_noise import LibraryNoise
from megatron_moe.launch.run_folder import RunFolder
from megatron_moe.launch.stop_request import Stopped, exit_on_sigterm, signals_raise
from megatron_moe.plan import plan
from megatron_moe.plan.auto import resolve

_BEGUN, _READ, _SAID = "megatron_moe/begun", "megatron_moe/read", "megatron_moe/said/"
_LEAVE_TOGETHER_S = 30.0


def train(config_path: Path, overrides: Sequence[str], identity: Identity) -> int:
    """Train as one rank. Returns the exit code; an InputError is raised in one rank, the others return 2."""
    exit_on_sigterm()
    os.environ.update(identity.environment())
    # What the libraries' C++ parts write goes past Python; torch looks at this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    noise = LibraryNoise()
    try:
        loaded = load(config_path, overrides, world_size=identity.world_size)
    except InputError:
        # Every rank finds the same mistakes, unless a node has other files.
        if identity.local_rank == 0:
            raise
        return exit_codes.WRONG_INPUT
    store = _meet()
    if identity.rank == 0:
        folder, code = _begin_for_all(loaded, store, identity.world_size)
    else:
        folder, code = _wait_for_rank_0(store)
    if folder is None:
        return code
    return _train_in(folder, identity, loaded, store, noise)


def _meet() -> Any:
    """The store of torch.distributed's `env://`; the process group will use the same one."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
    return store


def _begin_for_all(loaded: Loaded, store: Any, world_size: int) -> tuple[RunFolder | None, int]:
    """Rank 0: begin the job, and tell the others what came of it. This process keeps the lock."""
    code = exit_codes.FAILED
    folder = None
    try:
        with signals_raise():
            loaded = resolve(loaded)
            job = begin(loaded, plan.make(loaded.experiment), print)
        code = exit_codes.DONE
        folder = None if job.finished else job.locked.folder
    except InputError:
        code = exit_codes.WRONG_INPUT
        raise
    except Stopped:
        code = exit_codes.START_AGAIN
    finally:
        exit_on_sigterm()
        store.set(_BEGUN, json.dumps({"folder": folder and str(folder.path), "code": code}))
        if folder is None:
            # Under srun the store lives in this process.
            deadline = time.monotonic() + _LEAVE_TOGETHER_S
            while store.add(_READ, 0) < world_size - 1 and time.monotonic() < deadline:
                time.sleep(0.1)
    return folder, code


def _wait_for_rank_0(store: Any) -> tuple[RunFolder | None, int]:
    """Other ranks: wait, however long the data takes; not inside a call, where SIGTERM would wait too."""
    while not store.check([_BEGUN]):
        time.sleep(0.2)
    begun = json.loads(store.get(_BEGUN))
    store.add(_READ, 1)
    return (RunFolder(Path(begun["folder"])) if begun["folder"] else None), begun["code"]


def _train_in(folder: RunFolder, identity: Identity, loaded: Loaded, store: Any, noise: LibraryNoise) -> int:
    try:
        folder.logs.mkdir(exist_ok=True)
        noise.write_to(local_ranks.log_of(folder.logs, identity.rank))
        if identity.local_rank == 0 and identity.rank != 0:
            # Rank 0 has looked at its own node; another one may lack something.
            preflight.check(loaded)
        return rank.train(str(folder.path))
    except InputError as error:
        if _is_first_to_say(store, str(error)):
            raise
        return exit_codes.WRONG_INPUT
    except Exception as error:
        report = reports.of_exception(identity.rank, error, exit_codes.FAILED)
        for problem in report.problems:
            if _is_first_to_say(store, problem):
                print(one_line(problem), file=sys.stderr)
        if report.kind == "error":
            print(f"rank {identity.rank} failed:\n{report.traceback}", file=sys.stderr)
        rank.leave(exit_codes.FAILED)


def _is_first_to_say(store: Any, text: str) -> bool:
    """Whether no other rank has said the same."""
    with contextlib.suppress(
        Exception
    ):  # The store is gone with the rank that served it: better twice than never.
        return bool(store.add(_SAID + hashlib.sha256(text.encode()).hexdigest(), 1) == 1)
    return True
