"""NVIDIA B200-SXM-180GB, nodes of 8 (HGX or DGX)."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.config.clusters import h100

PRESET = replace(
    h100.PRESET,
    memory_gib=178.0,  # 180 GB HBM3e; what the driver leaves
    peak_bf16_tflops=2250.0,  # datasheet of HGX B200: 4.5 PFLOP/s a GPU with sparsity
    peak_fp8_tflops=4500.0,  # the same: 9 PFLOP/s with sparsity
    peak_fp32_tflops=75.0,  # datasheet of HGX B200: 600 TFLOP/s over 8 GPUs
    memory_bandwidth_gb_s=7700.0,  # datasheet of HGX B200: 62 TB/s over 8 GPUs
    intra_node_gb_s=900.0,  # datasheet: NVLink 5, 1,800 GB/s in both directions
)
