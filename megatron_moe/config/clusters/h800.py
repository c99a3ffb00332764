"""NVIDIA H800-SXM5-80GB: an H100 with less NVLink."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.config.clusters import h100

PRESET = replace(
    h100.PRESET,
    intra_node_gb_s=200.0,  # datasheet: 400 GB/s in both directions
)
