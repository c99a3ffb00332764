"""What is known of a cluster of one kind of machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The defaults of `launch.cluster`; the schema's docstrings say what each number is.

    Attributes:
        peak_bf16_tflops: of matrix units.
        peak_fp8_tflops: the same; None where there are none for FP8.
        peak_fp32_tflops: of true float32, not of TF32.
    """

    gpus_per_node: int
    memory_gib: float | None
    reserved_gib: float
    peak_bf16_tflops: float
    peak_fp8_tflops: float | None
    peak_fp32_tflops: float
    achievable_fraction: float
    attention_fraction: float
    matrix_padding: int
    memory_bandwidth_gb_s: float
    memory_fraction: float
    kernel_us: float
    host_us: float
    intra_node_gb_s: float
    intra_node_latency_us: float
    inter_node_gb_s: float
    inter_node_latency_us: float
    network_fraction: float
    all_to_all_fraction: float
    overlap_fraction: float
