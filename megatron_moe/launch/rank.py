"""A rank that `supervisor.run_ranks` started: `python -m megatron_moe.launch.rank COMMAND ...`.

It says nothing itself: what went wrong stands in its report; whoever started the ranks shows the first one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.launch import exit_codes, local_ranks, reports
from megatron_moe.launch.library_noise import LibraryNoise
from megatron_moe.launch.run_folder import RunFolder
from megatron_moe.launch.stop_request import exit_on_sigterm
from megatron_moe.plan.plan import Plan


def main(arguments: list[str]) -> NoReturn:
    """Run a command's function as one rank, and exit with what came of it."""
    rank = int(os.environ["RANK"])
    report_folder = Path(os.environ[reports.FOLDER_VARIABLE])
    # A rank that is still starting has nothing to save; the training loop replaces this handler.
    exit_on_sigterm()
    LibraryNoise().write_to(Path(os.environ[local_ranks.LOG_VARIABLE]))
    try:
        store = _serve_store()
        code = _COMMANDS[arguments[0]](*arguments[1:])
        # The other ranks need it until here.
        del store
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = exit_codes.WRONG_INPUT if isinstance(error, InputError) else exit_codes.FAILED
        reports.of_exception(rank, error, code).write(report_folder)
        leave(code)
    if code not in (exit_codes.DONE, exit_codes.START_AGAIN):
        reports.of_code(rank, code).write(report_folder)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """Exit at once after an error: the usual way out can wait for ever for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(run_folder: str) -> int:
    """Train what a run folder describes, as this rank of it. Returns the exit code."""
    from megatron_moe.training.run import train as run_training

    folder = RunFolder(Path(run_folder))
    exit_on_sigterm(folder.ask_for_requeue)
    experiment = load(folder.resolved, [], world_size=int(os.environ["WORLD_SIZE"])).experiment
    code = run_training(folder.path, experiment, Plan.from_json(folder.plan.read_text()))
    if code == exit_codes.START_AGAIN:
        folder.ask_for_requeue()
    return code


def verify(folder: str, part: str, steps: str, tolerance: str) -> int:
    """One part of `verify`: `layout` records what the ranks compute, `reference`, one process, compares.

    `tolerance` is a number, or null for what the precision allows.
    """
    from megatron_moe.training.verify import run_part

    at = Path(folder)
    experiment = load(at / f"{part}.yaml", [], world_size=int(os.environ["WORLD_SIZE"])).experiment
    return run_part(at, part, experiment, int(steps), json.loads(tolerance))


def profile(folder: str) -> int:
    """One rank of `profile`, which measures the experiment that lies in the folder."""
    from megatron_moe.training.profile import run_part

    at = Path(folder)
    experiment = load(at / "pieces.yaml", [], world_size=int(os.environ["WORLD_SIZE"])).experiment
    return run_part(at, experiment)


def generate(job: str) -> int:
    """One rank of `generate`, with what the file says."""
    from megatron_moe.inference.command import run
    from megatron_moe.inference.job import Job

    return run(Job.from_json(Path(job).read_text()))


def evaluate(job: str) -> int:
    """One rank of `eval`, with what the file says."""
    from megatron_moe.inference.evaluation.command import run
    from megatron_moe.inference.evaluation.job import EvalJob

    return run(EvalJob.from_json(Path(job).read_text()))


_COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "verify": verify,
    "profile": profile,
    "generate": generate,
    "evaluate": evaluate,
}


def _serve_store() -> Any:
    """In rank 0, the store on which the ranks meet, for as long as the result lives."""
    descriptor = os.environ.get(local_ranks.STORE_VARIABLE)
    if descriptor is None:
        return None
    import torch.distributed as dist

    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=int(descriptor),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
