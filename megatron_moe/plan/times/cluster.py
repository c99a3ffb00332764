"""The machines as the planner computes with them: `launch.cluster` in bytes, seconds and operations."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.rule import set_value
from megatron_moe.config.schema import Experiment

_GB = 1e9
_GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """Figures of one GPU, or one rank of a host, and of its links. Rates are a second.

    Attributes:
        source: whose figures these are, for the user to read.
        memory_bytes: None where it is not known.
        reserved_bytes: what of it is not to be planned with.
        peak_flops: of the matrix units in the precision of training.
        matrix_flops: what large products reach of it.
        fp32_flops: the same in float32.
        attention_flops: what attention scores reach.
        matrix_padding: each size of a product costs as if it were so many larger.
        memory_rate: bytes that norms and the like read and write.
        kernel_s: what a kernel takes beside its work.
        host_s: what the host takes to launch an operation.
        node_rate, node_latency_s: bytes that a rank sends to others of its node; of a message.
        network_rate, network_latency_s: the same to other nodes.
        all_to_all_fraction: part that an all-to-all reaches of the rates of other collectives.
        overlap_fraction: part of the time of communication under computation that is saved.
    """

    source: str
    gpus_per_node: int
    memory_bytes: float | None
    reserved_bytes: float
    peak_flops: float
    matrix_flops: float
    fp32_flops: float
    attention_flops: float
    matrix_padding: int
    memory_rate: float
    kernel_s: float
    host_s: float
    node_rate: float
    node_latency_s: float
    network_rate: float
    network_latency_s: float
    all_to_all_fraction: float
    overlap_fraction: float

    @property
    def usable_bytes(self) -> float | None:
        """Memory that can be planned with; None where it is not known."""
        return None if self.memory_bytes is None else self.memory_bytes - self.reserved_bytes

    @classmethod
    def of(cls, experiment: Experiment) -> Cluster:
        """The cluster of a filled experiment."""
        given = experiment.launch.cluster
        peak = set_value(given.peak_tflops) * 1e12
        of_peak, of_links = set_value(given.achievable_fraction), set_value(given.network_fraction)
        # The units for 16 bits are half as fast as those for 8, on all GPUs that have both.
        peak_16_bits = peak / 2 if experiment.training.fp8 is not None else peak
        return cls(
            source=f"the model of the cluster {given.preset}",
            gpus_per_node=set_value(given.gpus_per_node),
            memory_bytes=None if given.memory_gib is None else given.memory_gib * _GIB,
            reserved_bytes=set_value(given.reserved_gib) * _GIB,
            peak_flops=peak,
            matrix_flops=peak * of_peak,
            fp32_flops=set_value(given.peak_fp32_tflops) * 1e12 * of_peak,
            attention_flops=peak_16_bits * set_value(given.attention_fraction),
            matrix_padding=set_value(given.matrix_padding),
            memory_rate=set_value(given.memory_bandwidth_gb_s) * _GB * set_value(given.memory_fraction),
            kernel_s=set_value(given.kernel_us) * 1e-6,
            host_s=set_value(given.host_us) * 1e-6,
            node_rate=set_value(given.intra_node_gb_s) * _GB * of_links,
            node_latency_s=set_value(given.intra_node_latency_us) * 1e-6,
            network_rate=set_value(given.inter_node_gb_s) * _GB * of_links,
            network_latency_s=set_value(given.inter_node_latency_us) * 1e-6,
            all_to_all_fraction=set_value(given.all_to_all_fraction),
            overlap_fraction=set_value(given.overlap_fraction),
        )
