"""NVIDIA H200-SXM5-141GB: an H100 with more and faster memory."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.config.clusters import h100

PRESET = replace(
    h100.PRESET,
    memory_gib=139.8,  # 141 GB HBM3e; what the driver leaves
    memory_bandwidth_gb_s=4800.0,  # datasheet
)
