"""NVIDIA H100-SXM5-80GB, nodes of 8 (HGX or DGX)."""

from __future__ import annotations

from megatron_moe.config.clusters.preset import Preset

PRESET = Preset(
    gpus_per_node=8,  # HGX H100
    memory_gib=79.1,  # 80 GB HBM3; what the driver leaves
    reserved_gib=4.0,  # stated: CUDA context, NCCL's buffers, fragmentation
    peak_bf16_tflops=989.0,  # datasheet
    peak_fp8_tflops=1979.0,  # datasheet
    peak_fp32_tflops=67.0,  # datasheet
    achievable_fraction=0.76,  # calibrated: cuBLAS on large products, under the power limit
    attention_fraction=0.50,  # stated: fused attention of cuDNN or FlashAttention-3
    matrix_padding=128,  # stated: half a tile of 256
    memory_bandwidth_gb_s=3350.0,  # datasheet
    memory_fraction=0.80,  # stated: streaming kernels
    kernel_us=4.0,  # stated: launch, first and last wave
    host_us=25.0,  # calibrated on H100: Python, autograd and the driver for an operation
    intra_node_gb_s=450.0,  # datasheet: NVLink 4, 900 GB/s in both directions
    intra_node_latency_us=10.0,  # calibrated: one step of NCCL's ring, the slowest rank's delay included
    inter_node_gb_s=50.0,  # DGX H100's datasheet: 8 x NDR InfiniBand of 400 Gb/s a node
    inter_node_latency_us=15.0,  # stated: one step of NCCL's ring between nodes
    network_fraction=0.70,  # calibrated: NCCL's bandwidth at some ten megabytes over the datasheet's
    all_to_all_fraction=0.90,  # stated: an all-to-all over that
    overlap_fraction=0.35,  # calibrated: communication takes some of the GPU that it runs beside
)
