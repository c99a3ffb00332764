"""A run's checkpoints: saved by all ranks, resumed from the newest good one."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.errors import InputError, RunError
from megatron_moe.engine import checkpoint as sharded
from megatron_moe.engine import checkpoint_folders as folders
from megatron_moe.engine.versions import installed_versions
from megatron_moe.training import provenance
from megatron_moe.training.trainer import Trainer

Result = TypeVar("Result")


def save(trainer: Trainer) -> None:
    """Write everything that continuing to the bit needs. A collective over all ranks.

    Raises RunError where the files can't be written; what was saved before is untouched then.
    """
    aside = folders.folder_of(trainer.run_folder, trainer.iteration)
    try:
        aside = _on_rank_0(lambda: folders.begin(trainer.run_folder, trainer.iteration))
        sharded.save(aside, trainer.chunks, trainer.optimizer, _common(trainer))
        _on_rank_0(lambda: _describe(trainer, aside))
        hashes = _hash_together(aside)
        _on_rank_0(lambda: _finish(trainer, aside, hashes))
    except ConnectionError:
        raise
    # torch's own writer of files raises RuntimeError.
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = _storage_fault(error)
        if reason is None:
            raise
        free = shutil.disk_usage(trainer.run_folder).free
        if dist.get_rank() == 0 and aside.name.endswith(".part"):
            shutil.rmtree(aside, ignore_errors=True)
        raise RunError(
            f"{aside.parent}: cannot save the checkpoint after step {trainer.iteration}: {reason} "
            f"({free / 2**20:,.0f} MiB free there). Earlier checkpoints are untouched: when this is mended, "
            "start again, and the run goes on from the newest"
        ) from error


def resume(trainer: Trainer) -> Path | None:
    """Load the newest checkpoint whose bytes are those that were saved; None where the run has none. A
    collective.

    A damaged one is passed over, and that is said. Raises InputError where it does not fit the experiment, or
    where none is left that is good.
    """
    found = _on_rank_0(lambda: list(reversed(folders.all_of(trainer.run_folder))))
    faults: dict[Path, str] = {}
    for checkpoint in found:
        fault = _on_rank_0(partial(folders.fault, checkpoint)) or _changed_together(checkpoint)
        if fault is None:
            _load(trainer, checkpoint)
            _on_rank_0(partial(_settle, checkpoint, faults))
            return Path(checkpoint)
        faults[checkpoint] = fault
    if faults:
        raise InputError(
            *(f"{checkpoint} is damaged: {fault}" for checkpoint, fault in faults.items()),
            f"{trainer.run_folder}: no checkpoint of this run is whole; put a good copy there, or give this "
            "run another name to start anew",
        )
    return None


def _load(trainer: Trainer, checkpoint: Path) -> None:
    provenance.check(checkpoint, trainer.prepared)
    about = json.loads((checkpoint / provenance.ABOUT).read_text())
    # Of checkpoints from before there was such a thing it is not known.
    trainer.initialized_from = about.get("initialized_from")
    same_layout = about["layout"] == asdict(trainer.plan.layout)
    common = sharded.load(checkpoint, trainer.chunks, trainer.optimizer, with_rng=same_layout)
    trainer.iteration = common["iteration"]
    trainer.consumed_samples = common["consumed_samples"]


def _settle(loaded: Path, faults: dict[Path, str]) -> None:
    """Make the checkpoint that the run goes on from its newest one."""
    for checkpoint, fault in faults.items():
        place = folders.set_aside(checkpoint)
        print(
            f"{checkpoint} is damaged ({fault}): going on from {loaded.name}; it is kept as {place.name}",
            file=sys.stderr,
            flush=True,
        )
    folders.point_latest(loaded)


def _common(trainer: Trainer) -> dict[str, Any]:
    return {"iteration": trainer.iteration, "consumed_samples": trainer.consumed_samples}


def _describe(trainer: Trainer, aside: Path) -> None:
    """Write what must fit before the tensors are looked at, readable without unpickling."""
    about = {
        **_common(trainer),
        "layout": asdict(trainer.plan.layout),
        "versions": installed_versions(),
        "initialized_from": trainer.initialized_from,
        **provenance.of(trainer.prepared),
    }
    (aside / provenance.ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    (aside / "resolved.yaml").write_text(to_yaml(trainer.experiment), encoding="utf-8")


def _finish(trainer: Trainer, aside: Path, hashes: dict[str, str]) -> None:
    folders.commit(aside, trainer.run_folder, trainer.iteration, hashes)
    keep = trainer.experiment.checkpoint.keep
    if keep is not None:
        folders.keep_newest(trainer.run_folder, keep)


def _hash_together(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, each computed by one rank."""
    names = sorted(path.name for path in folder.iterdir())
    mine = names[dist.get_rank() :: dist.get_world_size()]
    parts = _on_each_rank(lambda: {name: folders.sha256(folder / name) for name in mine})
    return {name: digest for part in parts for name, digest in part.items()}


def _changed_together(checkpoint: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, each file being read by one rank; None if nothing is."""
    names = sorted(folders.files_of(checkpoint))
    mine = names[dist.get_rank() :: dist.get_world_size()]
    changed = sorted(chain(*_on_each_rank(lambda: folders.damaged(checkpoint, mine))))
    return f"the content of {', '.join(changed)} has changed" if changed else None


def _on_rank_0(function: Callable[[], Result]) -> Result:
    """The result of `function`, called on rank 0 only, on every rank; also the OSError that it raises."""
    box: list[Any] = [_attempt(function) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    result, error = box[0]
    if error is not None:
        raise error
    return result


def _on_each_rank(function: Callable[[], Result]) -> list[Result]:
    """The results of `function` on all ranks; or on all ranks the first OSError that one raised."""
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, _attempt(function))
    for _, error in boxes:
        if error is not None:
            raise error
    return [result for result, _ in boxes]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, OSError | None]:
    try:
        return function(), None
    except OSError as error:
        return None, error


def _storage_fault(error: BaseException) -> str | None:
    """What the file system refused, in words; None where that is not what went wrong."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, CheckpointException):
        # Megatron-Core lets all ranks fail together, but tells only rank 0 why.
        return _on_rank_0(lambda: _first_text(error))
    return _refused_write(str(error))


def _first_text(error: CheckpointException) -> str:
    text = next(str(failure) for failure, _ in error.failures.values())
    return _refused_write(text) or _errno_text(text) or text


def _refused_write(text: str) -> str | None:
    """What torch's writer of files met, in words; None where the text is not its."""
    if "PytorchStreamWriter" in text or "inline_container" in text or "iostream error" in text:
        return _errno_text(text) or "the file system refused a write"
    return None


def _errno_text(text: str) -> str | None:
    match = re.search(r"\[Errno \d+\] ([^:\]]+)", text)
    return match[1] if match else None
