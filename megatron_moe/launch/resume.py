"""Whether a run may go on with an experiment, and from where."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_moe.config.dump import flow
from megatron_moe.config.errors import InputError
from megatron_moe.config.resume import Difference, differences
from megatron_moe.config.schema import Experiment
from megatron_moe.config.yaml_tree import parse
from megatron_moe.launch.run_folder import RunFolder


def check(folder: RunFolder, experiment: Experiment, say: Callable[[str], None]) -> int | None:
    """The iteration of the checkpoint from which `experiment` goes on; None where it starts anew.

    A run without a checkpoint may be started again with any experiment.

    Args:
        say: takes a line that names the keys that changed and may.

    Raises InputError with a line for each key that changed and may not, and where something else lies in the
    place of the checkpoints.
    """
    checkpoints = folder.path / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise InputError(f"{checkpoints}: is no folder, and checkpoints are to be saved there; move it away")
    if (latest := checkpoints / "latest").is_dir():
        raise InputError(f"{latest}: is a folder, and a file that names the newest checkpoint belongs there")
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return None
    inside = checkpoint / folder.resolved.name
    saved = inside if inside.exists() else folder.resolved
    if not saved.exists():
        raise InputError(
            f"{saved}: missing, so that nobody knows how {checkpoint} was trained; give this run another name"
        )
    tree = parse(saved.read_text(encoding="utf-8"), str(saved))
    if tree.problems:
        raise InputError(*tree.problems)
    allowed, refused = differences(tree.values, experiment)
    if refused:
        raise InputError(
            *(f"{_words(change)}; set it back or give this run another name" for change in refused)
        )
    if allowed:
        say(f"Changed since {checkpoint.name}: {', '.join(_short(change) for change in allowed)}")
    return iteration_of(checkpoint)


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The newest complete checkpoint of a run."""
    from megatron_moe.engine.checkpoint_folders import newest

    return newest(folder.path)


def iteration_of(checkpoint: Path) -> int:
    """The number of steps that `iter_0000020` has behind it."""
    match = re.fullmatch(r"iter_(\d+)", checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def _words(change: Difference) -> str:
    key, before, now = change
    return f"{key}: is {flow(now)}, but was {flow(before)} when the checkpoint was saved"


def _short(change: Difference) -> str:
    key, before, now = change
    return f"{key} {flow(before)} -> {flow(now)}"
