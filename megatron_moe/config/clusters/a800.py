"""NVIDIA A800-SXM4-80GB: an A100 with less NVLink."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.config.clusters import a100

PRESET = replace(
    a100.PRESET,
    intra_node_gb_s=200.0,  # datasheet: 400 GB/s in both directions
    inter_node_gb_s=12.5,  # Skywork-MoE's report: 800 Gb/s RoCE a node, over 8 GPUs
)
