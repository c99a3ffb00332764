"""Machines whose figures are known: one file each, with the source of every number.

Where a file says "datasheet", the vendor's published figures are meant, dense and without sparsity. "Stated"
and "calibrated" numbers are ours: what programs reach of the datasheet's figures, the latter chosen so that
the published runs of docs/planner.md come out. They are the same for every model and layout on the machine.
"""

from __future__ import annotations

from megatron_moe.config.clusters import a100, a800, b200, h100, h200, h800, rtx4090
from megatron_moe.config.clusters.preset import Preset

PRESETS: dict[str, Preset] = {
    "a100": a100.PRESET,
    "a800": a800.PRESET,
    "h100": h100.PRESET,
    "h800": h800.PRESET,
    "h200": h200.PRESET,
    "b200": b200.PRESET,
    "rtx4090": rtx4090.PRESET,
}
"""By their names in `launch.cluster.preset`; `this-machine` is looked at instead (this_machine.py)."""
