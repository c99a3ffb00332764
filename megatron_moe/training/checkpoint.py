"""A run's checkpoints: saved by all ranks, resumed from the newest good one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.errors import InputError
from megatron_moe.engine import checkpoint as sharded
from megatron_moe.engine.versions import installed_versions
from megatron_moe.training import checkpoint_folders as folders
from megatron_moe.training.trainer import Trainer


def save(trainer: Trainer) -> None:
    """Write everything that continuing to the bit needs. A collective over all ranks."""
    aside = _from_rank_0(lambda: folders.begin(trainer.run_folder, trainer.iteration))
    sharded.save(aside, trainer.chunks, trainer.optimizer, _common(trainer))
    if dist.get_rank() == 0:
        (aside / "resolved.yaml").write_text(to_yaml(trainer.experiment), encoding="utf-8")
    dist.barrier()
    hashes = _hash_together(aside)
    _from_rank_0(lambda: _finish(trainer, aside, hashes))


def resume(trainer: Trainer) -> Path | None:
    """Load the newest checkpoint whose bytes are those that were saved; None where there is none. A
    collective.

    A damaged one is passed over, and that is said. Raises InputError where it does not fit the experiment.
    """
    for checkpoint in _from_rank_0(lambda: list(reversed(folders.complete(trainer.run_folder)))):
        damaged = _damaged_together(checkpoint)
        if not damaged:
            _load(trainer, checkpoint)
            return Path(checkpoint)
        if dist.get_rank() == 0:
            print(
                f"{checkpoint} is damaged ({', '.join(damaged)}); trying the one before it",
                file=sys.stderr,
                flush=True,
            )
    return None


def _load(trainer: Trainer, checkpoint: Path) -> None:
    about = json.loads((checkpoint / "about.json").read_text())
    _refuse_other(about, trainer)
    same_layout = about["layout"] == asdict(trainer.plan.layout)
    try:
        common = sharded.load(checkpoint, trainer.chunks, trainer.optimizer, with_rng=same_layout)
    except KeyError as error:
        raise InputError(str(error.args[0])) from error
    trainer.iteration = common["iteration"]
    trainer.consumed_samples = common["consumed_samples"]
    if dist.get_rank() == 0:
        folders.point_latest(checkpoint)


def _common(trainer: Trainer) -> dict[str, Any]:
    return {"iteration": trainer.iteration, "consumed_samples": trainer.consumed_samples}


def _about(trainer: Trainer) -> dict[str, Any]:
    """What must fit before the tensors are looked at, readable without unpickling."""
    tokenizer = trainer.prepared.tokenizer
    return {
        "iteration": trainer.iteration,
        "consumed_samples": trainer.consumed_samples,
        "layout": asdict(trainer.plan.layout),
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "spec": trainer.experiment.model.spec,
        "versions": installed_versions(),
    }


def _refuse_other(about: dict[str, Any], trainer: Trainer) -> None:
    tokenizer = trainer.prepared.tokenizer
    if tokenizer is not None and about["tokenizer_sha256"] != tokenizer.sha256:
        raise InputError(
            f"data.tokenizer: its hash {tokenizer.sha256[:12]} is not {str(about['tokenizer_sha256'])[:12]}, "
            "with which the checkpoint was trained; use that tokenizer, or another name for a new run"
        )


def _finish(trainer: Trainer, aside: Path, hashes: dict[str, str]) -> None:
    about = aside / "about.json"
    about.write_text(json.dumps(_about(trainer), indent=2) + "\n")
    hashes[about.name] = folders.sha256(about)
    folders.commit(aside, trainer.run_folder, trainer.iteration, hashes)
    keep = trainer.experiment.checkpoint.keep
    if keep is not None:
        folders.keep_newest(trainer.run_folder, keep)


def _hash_together(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, each computed by one rank; the whole on rank 0."""
    names = sorted(path.name for path in folder.iterdir())
    mine = {name: folders.sha256(folder / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    parts: list[dict[str, str]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return {name: digest for part in parts or [] for name, digest in part.items()}


def _damaged_together(checkpoint: Path) -> list[str]:
    """Names of damaged files, on every rank; each file is read by one rank."""
    names = sorted(folders.files_of(checkpoint))
    mine = folders.damaged(checkpoint, names[dist.get_rank() :: dist.get_world_size()])
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return sorted(name for part in parts for name in part)


def _from_rank_0(function: Any) -> Any:
    """The result of `function`, called on rank 0 only, on every rank; also what it raises."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except OSError as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
