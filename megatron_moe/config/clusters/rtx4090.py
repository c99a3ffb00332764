"""NVIDIA GeForce RTX 4090, servers of 8 on PCI Express."""

from __future__ import annotations

from megatron_moe.config.clusters.preset import Preset

PRESET = Preset(
    gpus_per_node=8,  # usual servers
    memory_gib=24.0,  # Ada's whitepaper
    reserved_gib=2.0,  # stated: what the driver takes, CUDA context, NCCL's buffers, fragmentation
    peak_bf16_tflops=165.2,  # Ada's whitepaper, with FP32 accumulation
    peak_fp8_tflops=330.3,  # the same
    peak_fp32_tflops=82.6,  # the same
    achievable_fraction=0.85,  # stated: cuBLAS on large products
    attention_fraction=0.70,  # stated: FlashAttention-2
    matrix_padding=64,  # stated: half a tile
    memory_bandwidth_gb_s=1008.0,  # Ada's whitepaper
    memory_fraction=0.85,  # stated: streaming kernels
    kernel_us=4.0,  # stated: launch, first and last wave
    host_us=25.0,  # as on H100
    intra_node_gb_s=32.0,  # PCI Express 4.0 x16, one direction
    intra_node_latency_us=20.0,  # stated: through the host's memory, for there is no peer access
    inter_node_gb_s=3.125,  # stated: one link of 200 Gb/s a node
    inter_node_latency_us=25.0,  # stated
    network_fraction=0.45,  # stated: each byte crosses the host's memory
    all_to_all_fraction=0.35,  # stated
    overlap_fraction=0.50,  # stated: the rest is taken from computation
)
