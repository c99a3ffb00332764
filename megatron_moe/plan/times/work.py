"""What a rank computes of one microbatch, and with whom it shares matrices."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.precision import element_size
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.times.collectives import (
    Groups,
    all_gather_s,
    all_reduce_s,
    exposed_s,
    reduce_scatter_s,
)
from megatron_moe.plan.times.kernels import Cost, Kernels


@dataclass(frozen=True)
class Work:
    """One rank's part of a microbatch.

    Attributes:
        tokens: t, those of the tensor-parallel group: the microbatch's over CP.
        here: those that the rank holds between tensor-parallel regions: t over TP under sequence parallelism.
        tensor: TP.
        size: bytes of an element.
    """

    experiment: Experiment
    layout: Layout
    cluster: Cluster
    groups: Groups
    kernels: Kernels
    tokens: float
    here: float
    tensor: int
    size: int

    @classmethod
    def of(cls, experiment: Experiment, layout: Layout, cluster: Cluster) -> Work:
        """The work of a rank of a filled experiment."""
        training, size = experiment.training, element_size(experiment)
        tokens = training.micro_batch_size * training.seq_length / layout.context_parallel_size
        tensor = layout.tensor_model_parallel_size
        # The product's result is written and added to the buffer, or the product adds to the buffer itself.
        buffer = 4 if experiment.parallel.grad_reduce_in_fp32 else size
        is_fused = training.gradient_accumulation_fusion
        return cls(
            experiment=experiment,
            layout=layout,
            cluster=cluster,
            groups=Groups(layout, cluster.gpus_per_node),
            kernels=Kernels(
                cluster, size, buffer if is_fused else 2 * buffer + size, training.fp8 is not None
            ),
            tokens=tokens,
            here=tokens / tensor if experiment.parallel.sequence_parallel else tokens,
            tensor=tensor,
            size=size,
        )

    def columns(self, inner: int, columns: float) -> Cost:
        """A product whose columns TP ranks share, with what makes its input whole before: all-gather under
        sequence parallelism.

        Backward, the reduction of the input's gradient goes on while weights' gradients are computed, and the
        second all-gather while the input's gradient is (Megatron-Core's LinearWithGradAccumulation...).
        """
        cost = self.kernels.product(self.tokens, inner, columns / self.tensor)
        if self.tensor == 1:
            return cost
        cluster, group, size = self.cluster, self.groups.tensor, self.tokens * inner * self.size
        if self.experiment.parallel.sequence_parallel:
            gather_s = all_gather_s(cluster, group, size)
            to_input_s = cost.backward_s - cost.weight_gradient_s
            late_s = exposed_s(cluster, gather_s, to_input_s)
            late_s += exposed_s(cluster, reduce_scatter_s(cluster, group, size), cost.weight_gradient_s)
            return cost + Cost(gather_s, late_s)
        reduce_s = all_reduce_s(cluster, group, size)
        return cost + Cost(0.0, exposed_s(cluster, reduce_s, cost.weight_gradient_s))

    def rows(self, inner: float, columns: int) -> Cost:
        """A product whose inner width TP ranks share, with the sum over them behind it."""
        cost = self.kernels.product(self.tokens, inner / self.tensor, columns)
        if self.tensor == 1:
            return cost
        cluster, group, size = self.cluster, self.groups.tensor, self.tokens * columns * self.size
        if self.experiment.parallel.sequence_parallel:
            return cost + Cost(reduce_scatter_s(cluster, group, size), all_gather_s(cluster, group, size))
        return cost + Cost(all_reduce_s(cluster, group, size), 0.0)
