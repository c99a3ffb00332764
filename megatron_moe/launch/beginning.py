"""What has to be in place before any rank works: the run folder, its lock, the data and the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.config.dump import to_yaml
from megatron_moe.data.prepare import prepare
from megatron_moe.launch import preflight, resume, sinks, starting
from megatron_moe.launch.run_folder import LockedRunFolder, open_locked
from megatron_moe.plan.plan import Plan
from megatron_moe.training import provenance

if TYPE_CHECKING:
    from megatron_moe.config.loading import Loaded


@dataclass(frozen=True)
class Job:
    """A run that may start, and nobody else's as long as `locked` is held."""

    locked: LockedRunFolder
    finished: bool
    """There is nothing left to train."""

    @property
    def path(self) -> Path:
        return self.locked.folder.path


def begin(loaded: Loaded, plan: Plan, say: Callable[[str], None]) -> Job:
    """Open the run folder, check that it may go on with this experiment, prepare data, write what ranks read.

    Args:
        say: takes the lines that the user should see.

    Raises InputError; nothing new is left in the run folder then.
    """
    experiment = loaded.experiment
    locked = open_locked(experiment.logging.root, experiment.name)
    try:
        iteration = resume.check(locked.folder, experiment, say)
        if iteration is not None and iteration >= experiment.training.train_iters:
            say(
                f"{locked.folder.path} is finished: {iteration} of {experiment.training.train_iters} "
                "iterations are done. A larger training.train_iters goes on from there, "
                "another name starts a new run."
            )
            return Job(locked, finished=True)
        came_with = None
        source = experiment.checkpoint.initialize_from
        if iteration is None:
            came_with = starting.check(loaded)
        elif source is not None:
            say(f"checkpoint.initialize_from ({source}) is passed over: the run has checkpoints of its own")
        preflight.check(loaded)
        sinks.check(loaded)
        prepared = prepare(experiment, Path(experiment.logging.root))
        if (checkpoint := resume.newest_checkpoint(locked.folder)) is not None:
            provenance.check(checkpoint, prepared)
        if came_with is not None:
            starting.keep(came_with, locked.folder.path)
        locked.folder.write(loaded.text, to_yaml(experiment), plan.to_json())
        locked.folder.requeue.unlink(missing_ok=True)
    except BaseException:
        locked.discard()
        raise
    return Job(locked, finished=False)
