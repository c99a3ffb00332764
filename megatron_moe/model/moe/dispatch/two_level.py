"""An all-to-all in two levels: inside nodes, then between them.

Rank j of node a has rows for rank i of node b. First they go to rank i of node a, over the fast links inside
the node, and from there to rank i of node b. So each rank talks to one rank of every other node and not to
all, with messages that many times larger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.model.moe.dispatch import exchange
from megatron_moe.model.moe.dispatch.alltoall import turned
from megatron_moe.model.moe.dispatch.transfer import TransferTimes
from megatron_moe.model.moe.groups import rank, size

Counts = list[list[int]]
"""Rows from each rank of this node to each node."""


def start(
    rows: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: Any,
    ranks_per_node: int,
    times: TransferTimes | None = None,
) -> Pending:
    """As `exchange.start`. What is computed before `wait` hides the way inside the nodes.

    Args:
        ranks_per_node: consecutive ranks of the group that lie in one node. Divides the group.
        times: where it is measured how long it takes, both ways.
    """
    nodes = size(group) // ranks_per_node
    node, place = divmod(rank(group), ranks_per_node)
    passing = _passing(send_counts, group, ranks_per_node, rows.device)
    inside = [0] * size(group), [0] * size(group)
    for other, counts in enumerate(passing):
        inside[0][node * ranks_per_node + other] = sum(send_counts[other::ranks_per_node])
        inside[1][node * ranks_per_node + other] = sum(counts)
    between = [0] * size(group), [0] * size(group)
    for other in range(nodes):
        first = other * ranks_per_node
        between[0][first + place] = sum(counts[other] for counts in passing)
        between[1][first + place] = sum(receive_counts[first : first + ranks_per_node])
    sorted_rows = turned(rows, send_counts, nodes, ranks_per_node)
    return Pending(exchange.start(sorted_rows, *inside, group, times), passing, between, group, times)


class Pending:
    """Rows on their way inside the nodes.

    Args:
        inside: what brings them to the rank that passes them on.
        passing: how many rows each rank of the node sends through this one to each node.
        between: what this rank sends to and gets from each rank between nodes.
        group: the process group.
        times: where it is measured how long it takes.
    """

    def __init__(
        self,
        inside: exchange.Pending,
        passing: Counts,
        between: tuple[list[int], list[int]],
        group: Any,
        times: TransferTimes | None,
    ) -> None:
        self._inside, self._passing, self._between = inside, passing, between
        self._group, self._times = group, times

    def wait(self) -> Tensor:
        """[sum of receive_counts, ..], those of rank 0 first. To be called once."""
        counts = [count for line in self._passing for count in line]
        rows = turned(self._inside.wait(), counts, len(self._passing), len(self._passing[0]))
        return exchange.exchange(rows, *self._between, self._group, self._times)


def _passing(send_counts: list[int], group: Any, ranks_per_node: int, device: torch.device) -> Counts:
    """[places][nodes] rows that each rank of this node sends through this rank to each node."""
    nodes, node = size(group) // ranks_per_node, rank(group) // ranks_per_node
    counts = torch.tensor(send_counts, device=device).view(nodes, ranks_per_node).t().contiguous()
    splits = [0] * size(group)
    splits[node * ranks_per_node : (node + 1) * ranks_per_node] = [nodes] * ranks_per_node
    received = exchange.exchange(counts.view(-1), splits, splits, group)
    result: Counts = received.view(ranks_per_node, nodes).tolist()
    return result
