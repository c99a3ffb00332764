"""`megatron-moe profile`, as one rank: what each kind of piece takes on this machine, under the load of
training (see `profile_session`).
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.errors import RunError
from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.plan import devices
from megatron_moe.training.profile_session import Session

LAYERS = ("dense", "moe")
"""Kinds that `recompute.layers_per_stage` counts."""
MEASURED = "measured.json"
"""What `run_part` writes."""


def run_part(folder: Path, experiment: Experiment) -> int:
    """Measure, and let rank 0 write what `Profile` needs of it into `folder`. A collective over all ranks.

    Raises RunError where memory does not suffice.
    """
    try:
        found = measure(folder, experiment)
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU's memory does not suffice for two layers of each kind with embedding and output layer; "
            "profile a layout that splits them over more ranks, or a smaller training.micro_batch_size"
        ) from error
    if dist.get_rank() == 0:
        (folder / MEASURED).write_text(json.dumps(found))
    # No rank leaves before all have done everything: the first that does may have the others ended.
    dist.barrier()
    groups.shutdown()
    return 0


def measure(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """The fields of `plan.profile.Profile` that are measured. A collective over all ranks."""
    session = Session(experiment, folder)
    device = session.trainer.device
    times = session.times()
    (forward_s, backward_s), (_, again_s), (_, frozen_s) = times["plain"], times["again"], times["frozen"]
    kept, working = session.memory("plain")
    kept_again, _ = session.memory("again")
    exposed_s, hidden_s = session.communication()
    optimizer_s, optimizer_parameters = session.update()
    pieces = {
        kind: {
            "forward_s": forward_s[kind],
            "backward_s": backward_s[kind],
            "recompute_s": max(0.0, again_s[kind] - backward_s[kind]) if kind in LAYERS else 0.0,
            "weight_gradient_s": max(0.0, backward_s[kind] - frozen_s[kind]),
            "exposed_s": exposed_s if kind == "moe" else 0.0,
            "hidden_s": hidden_s if kind == "moe" else 0.0,
            "kept_bytes": kept[kind],
            "kept_if_recomputed_bytes": (kept_again if kind in LAYERS else kept)[kind],
            "working_bytes": working[kind],
        }
        for kind in forward_s
    }
    return {
        "device": devices.processor() if device.is_host else torch.cuda.get_device_name(),
        "on_host": device.is_host,
        "versions": versions(),
        "pieces": pieces,
        "optimizer_s": optimizer_s,
        "optimizer_parameters": optimizer_parameters,
    }


def versions() -> dict[str, str]:
    """Of what the times may depend on."""
    import megatron.core

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
    }
