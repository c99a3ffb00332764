"""Rules about the machines that are planned with."""

from __future__ import annotations

from megatron_moe.config.clusters import PRESETS
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems, set_value
from megatron_moe.config.schema import Experiment

_MEMORY, _RESERVED = "launch.cluster.memory_gib", "launch.cluster.reserved_gib"
_PRESET = "launch.cluster.preset"


def memory_is_left(e: Experiment) -> Problems:
    """What is reserved leaves something."""
    cluster = e.launch.cluster
    reserved = set_value(cluster.reserved_gib)
    if cluster.memory_gib is not None and reserved >= cluster.memory_gib:
        text = f"leaves nothing beside {_RESERVED}"
        yield Problem((_MEMORY, _RESERVED), text, f"use more than {reserved:g}, or set {_RESERVED} lower")


def units_for_fp8(e: Experiment) -> Problems:
    """Products in FP8 need units for it, which not every GPU has."""
    preset = PRESETS.get(e.launch.cluster.preset)
    if e.training.fp8 is not None and preset is not None and preset.peak_fp8_tflops is None:
        with_units = ", ".join(name for name, other in PRESETS.items() if other.peak_fp8_tflops is not None)
        text = f"needs units that the GPUs of {_PRESET} do not have"
        yield Problem(("training.fp8", _PRESET), text, f"leave it out, or use {with_units}")
