"""Names of devices: of this machine, without torch, and of the planner's presets."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_moe.config.clusters import this_machine
from megatron_moe.config.schema import Experiment

_GPUS = Path("/proc/driver/nvidia/gpus")
_PROCESSORS = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor's name, as its maker spells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", _PROCESSORS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else "a processor without a name"


def gpus() -> frozenset[str]:
    """Names of this machine's GPUs, as the driver has them: `NVIDIA H200`."""
    names = set()
    for path in _GPUS.glob("*/information"):
        found = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
        names |= {found[1].strip()} if found else set()
    return frozenset(names)


def difference(experiment: Experiment, device: str) -> str:
    """What the planner plans for where that is not `device`; empty where it is."""
    preset = experiment.launch.cluster.preset
    if preset != "this-machine":
        return "" if preset in device.lower().replace(" ", "") else f"launch.cluster.preset {preset}"
    here = gpus()
    if device in here or device == processor():
        return ""
    return ", ".join(sorted(here)) or processor()


def noun(experiment: Experiment) -> str:
    """What a rank computes on, in a word."""
    is_host = experiment.launch.cluster.preset == "this-machine" and not this_machine.gpus()
    return "rank" if is_host else "GPU"
