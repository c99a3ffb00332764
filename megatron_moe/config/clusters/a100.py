"""NVIDIA A100-SXM4-80GB, nodes of 8 (HGX or DGX)."""

from __future__ import annotations

from megatron_moe.config.clusters.preset import Preset

PRESET = Preset(
    gpus_per_node=8,  # HGX A100
    memory_gib=79.3,  # 80 GB HBM2e; what the driver leaves
    reserved_gib=3.0,  # stated: CUDA context, NCCL's buffers, fragmentation
    peak_bf16_tflops=312.0,  # datasheet
    peak_fp8_tflops=None,  # Ampere has no FP8 units
    peak_fp32_tflops=19.5,  # datasheet
    achievable_fraction=0.70,  # calibrated: cuBLAS on large products, under the power limit
    attention_fraction=0.50,  # stated: FlashAttention-2
    matrix_padding=64,  # stated: half a tile
    memory_bandwidth_gb_s=2039.0,  # datasheet
    memory_fraction=0.80,  # stated: streaming kernels
    kernel_us=4.0,  # stated: launch, first and last wave
    host_us=25.0,  # as on H100
    intra_node_gb_s=300.0,  # datasheet: NVLink 3, 600 GB/s in both directions
    intra_node_latency_us=20.0,  # calibrated: one step of NCCL's ring, the slowest rank's delay included
    inter_node_gb_s=25.0,  # DGX A100's datasheet: 8 x HDR InfiniBand of 200 Gb/s a node
    inter_node_latency_us=15.0,  # stated: one step of NCCL's ring between nodes
    network_fraction=0.50,  # calibrated: NCCL's bandwidth at some ten megabytes over the datasheet's
    all_to_all_fraction=0.90,  # stated: an all-to-all over that
    overlap_fraction=0.20,  # calibrated: NCCL takes some of the GPU that it runs beside
)
