"""How long the pieces of a layer compute: matrix products, attention scores, and what memory bounds.

A matrix product takes the longer of its operations over the rate that large products reach, each of its sizes
counted as `matrix_padding` larger, and its bytes over memory's rate (roofline). What memory bounds takes its
bytes over that rate. Every kernel takes `kernel_s` more.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.plan.times.cluster import Cluster

_SCORES_BACKWARD = 3.0
"""Over the forward pass: 2.5 times the operations (FlashAttention-2, section 3.2), at 5/6 of its speed."""


@dataclass(slots=True)
class Cost:
    """Seconds of a part of a layer for one microbatch."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    """The gradients of weights included."""
    weight_gradient_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_s + other.forward_s,
            self.backward_s + other.backward_s,
            self.weight_gradient_s + other.weight_gradient_s,
        )


@dataclass(frozen=True)
class Kernels:
    """The kernels of one rank.

    Attributes:
        element_size: bytes of a weight or an activation.
        gradient_bytes: what adding the gradient of one weight to its buffer reads and writes.
        in_fp8: whether matrix products are, into which their inputs are cast first.
    """

    cluster: Cluster
    element_size: int
    gradient_bytes: int
    in_fp8: bool = False

    def product(self, rows: float, inner: float, columns: float, experts: int = 1) -> Cost:
        """[rows, inner] x [inner, columns], for each of so many experts, with weights of the second."""
        cluster = self.cluster
        forward_s = self._multiply(rows, inner, columns, experts)
        to_input_s = self._multiply(rows, columns, inner, experts)
        to_weight_s = self._multiply(inner, rows, columns, experts)
        to_weight_s += experts * inner * columns * self.gradient_bytes / cluster.memory_rate
        if self.in_fp8:
            # Read in 16 bits, written in 8 as it is and transposed.
            cast_s = 4 * experts * rows / cluster.memory_rate
            forward_s += cast_s * inner + cluster.kernel_s
            to_input_s += cast_s * columns + cluster.kernel_s
        return Cost(forward_s, to_input_s + to_weight_s, to_weight_s)

    def _multiply(self, rows: float, inner: float, columns: float, experts: int) -> float:
        cluster, padding = self.cluster, self.cluster.matrix_padding
        operations = 2.0 * experts * (rows + padding) * (inner + padding) * (columns + padding)
        elements = experts * (rows * inner + inner * columns + rows * columns)
        seconds = max(operations / cluster.matrix_flops, elements * self.element_size / cluster.memory_rate)
        return seconds + cluster.kernel_s

    def scores(self, operations: float) -> Cost:
        """Fused attention of so many operations forward."""
        forward_s = operations / self.cluster.attention_flops + self.cluster.kernel_s
        return Cost(forward_s, _SCORES_BACKWARD * forward_s)

    def streamed(self, forward: float, backward: float, kernels: int = 1) -> Cost:
        """What reads and writes so many elements forward and backward, in so many kernels each."""
        rate, fixed_s = self.cluster.memory_rate / self.element_size, kernels * self.cluster.kernel_s
        return Cost(forward / rate + fixed_s, backward / rate + fixed_s)
