"""How long messages between ranks take: latency and bytes over bandwidth (the alpha-beta model), within
nodes, between them, or both.

Neighbouring ranks share a node: rank r lies on node r // gpus_per_node. A group of n ranks has p of them on
each node. Its collectives run as rings that pass each node once, over the links of all its p ranks (NCCL's
way), so that the slower of two flows counts:

    within a node   (n - 1) / n of the bytes over one rank's links to its node
    between nodes   (n - p) / n of the bytes over p ranks' links to other nodes
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_moe.plan.layout import Layout
from megatron_moe.plan.times.cluster import Cluster


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, as far as time depends on them.

    Attributes:
        size: n.
        on_node: p, the members on a node; of groups that lie unevenly, of the one that lies worst.
    """

    size: int
    on_node: int

    @property
    def nodes(self) -> int:
        """Over how many nodes they lie."""
        return -(-self.size // self.on_node)


def group(size: int, stride: int, gpus_per_node: int, world_size: int) -> Group:
    """The group of every stride-th rank, `size` of them."""
    span = size * stride
    if world_size <= gpus_per_node or gpus_per_node % span == 0:
        return Group(size, size)
    if span < gpus_per_node:
        # Some groups lie on the border of two nodes.
        return Group(size, max(1, size // 2))
    return Group(size, max(1, gpus_per_node // stride))


@dataclass(frozen=True)
class Groups:
    """The groups that a rank of a layout communicates in; consecutive axes of `plan.layout`'s order."""

    layout: Layout
    gpus_per_node: int

    @cached_property
    def tensor(self) -> Group:
        """TP ranks, which share each matrix."""
        return self._group(self.layout.tensor_model_parallel_size, 1)

    @cached_property
    def context(self) -> Group:
        """CP ranks, which share each sequence."""
        layout = self.layout
        return self._group(layout.context_parallel_size, layout.tensor_model_parallel_size)

    @cached_property
    def replicas(self) -> Group:
        """DP x CP ranks, which hold the same dense weights."""
        layout = self.layout
        size = layout.data_parallel_size * layout.context_parallel_size
        return self._group(size, layout.tensor_model_parallel_size)

    @cached_property
    def experts(self) -> Group:
        """EP x ETP ranks, which together hold each expert once."""
        layout = self.layout
        return self._group(layout.expert_model_parallel_size * layout.expert_tensor_parallel_size, 1)

    @cached_property
    def expert_replicas(self) -> Group:
        """The ranks that hold the same experts."""
        layout = self.layout
        stride = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
        return self._group(layout.expert_data_parallel_size, stride)

    @cached_property
    def stages(self) -> Group:
        """PP ranks."""
        layout = self.layout
        stride = layout.world_size // layout.pipeline_model_parallel_size
        return self._group(layout.pipeline_model_parallel_size, stride)

    def _group(self, size: int, stride: int) -> Group:
        return group(size, stride, self.gpus_per_node, self.layout.world_size)


def all_gather_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """Seconds until every rank has all of `size_bytes`, of which each had its part; a reduce-scatter of so
    many bytes a rank takes as long."""
    n, p = group.size, group.on_node
    if n == 1 or size_bytes == 0:
        return 0.0
    latency_s = (p - 1) * cluster.node_latency_s + (group.nodes - 1) * cluster.network_latency_s
    seconds = (n - 1) / n * size_bytes / cluster.node_rate if p > 1 else 0.0
    if n > p:
        seconds = max(seconds, (n - p) / n * size_bytes / (p * cluster.network_rate))
    return latency_s + seconds


reduce_scatter_s = all_gather_s


def all_reduce_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * all_gather_s(cluster, group, size_bytes)


def all_to_all_s(cluster: Cluster, group: Group, to_others_bytes: float) -> float:
    """Seconds until each rank has sent so many bytes to the others, as many to each."""
    n, p = group.size, group.on_node
    if n == 1 or to_others_bytes == 0:
        return 0.0
    within = to_others_bytes * (p - 1) / (n - 1)
    return exchange_s(cluster, within, to_others_bytes - within)


def exchange_s(
    cluster: Cluster, within_bytes: float, between_bytes: float, fraction: float | None = None
) -> float:
    """An all-to-all in which a rank sends so many bytes within its node and to other nodes, both at once.

    Args:
        fraction: of the rates of other collectives; None: an all-to-all's.
    """
    seconds = latency_s = 0.0
    if within_bytes:
        seconds, latency_s = within_bytes / cluster.node_rate, cluster.node_latency_s
    if between_bytes:
        seconds = max(seconds, between_bytes / cluster.network_rate)
        latency_s = cluster.network_latency_s
    return latency_s + seconds / (cluster.all_to_all_fraction if fraction is None else fraction)


def exposed_s(cluster: Cluster, communication_s: float, computation_s: float) -> float:
    """What communication adds to the computation that it goes on under."""
    return communication_s - cluster.overlap_fraction * min(communication_s, computation_s)


def point_to_point_s(cluster: Cluster, crosses_nodes: bool, size_bytes: float) -> float:
    """Seconds of one message."""
    if crosses_nodes:
        return cluster.network_latency_s + size_bytes / cluster.network_rate
    return cluster.node_latency_s + size_bytes / cluster.node_rate
