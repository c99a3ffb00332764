"""How long messages take, and which ranks share a node."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.plan.layout import GroupKind, Layout
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.times.collectives import (
    Group,
    Groups,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    exposed_s,
    point_to_point_s,
)

CLUSTER = Cluster(
    source="a test",
    gpus_per_node=8,
    memory_bytes=None,
    reserved_bytes=0,
    peak_flops=1e15,
    matrix_flops=1e15,
    fp32_flops=1e14,
    attention_flops=1e15,
    matrix_padding=0,
    memory_rate=1e12,
    kernel_s=0,
    host_s=0,
    node_rate=100e9,
    node_latency_s=0,
    network_rate=10e9,
    network_latency_s=0,
    all_to_all_fraction=0.5,
    overlap_fraction=0.4,
)

KINDS: dict[str, GroupKind] = {
    "tensor": "tp",
    "context": "cp",
    "replicas": "dp_cp",
    "experts": "tp_ep",
    "expert_replicas": "expert_dp",
    "stages": "pp",
}
POWERS = st.sampled_from([1, 2, 4, 8])


@given(POWERS, POWERS, POWERS, POWERS, POWERS, POWERS, st.sampled_from([2, 4, 8]))
def test_groups_lie_on_nodes_as_the_layout_says(
    tp: int, pp: int, cp: int, dp: int, ep: int, etp: int, gpus_per_node: int
) -> None:
    """Against the layout's own groups, rank by rank."""
    if (tp * cp * dp) % (ep * etp):
        return
    layout = Layout(tp, pp, 1, cp, ep, etp, dp)
    groups = Groups(layout, gpus_per_node)
    for name, kind in KINDS.items():
        found: Group = getattr(groups, name)
        for ranks in layout.groups(kind):
            on_nodes = Counter(rank // gpus_per_node for rank in ranks)
            assert found.size == len(ranks)
            assert set(on_nodes.values()) == {found.on_node}
            assert found.nodes == len(on_nodes)


def test_a_group_on_the_border_of_two_nodes_lies_on_both() -> None:
    """Ranks 6, 7 and 8 of TP 3 on nodes of 8."""
    assert Groups(Layout(3, 8, 1, 1, 1, 1, 1), 8).tensor.nodes > 1


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        (Group(1, 1), 0.0),
        # 3/4 of 8 GB over 100 GB/s
        (Group(4, 4), 0.06),
        # one rank a node: 3/4 of 8 GB over 10 GB/s
        (Group(4, 1), 0.6),
        # two on each of two nodes: half of it comes from the other node, over the links of two
        (Group(4, 2), 0.2),
        # eight on each of two nodes: 4 GB over eight links take less than 15/16 of 8 GB over one rank's
        (Group(16, 8), 0.075),
    ],
    ids=["alone", "one node", "a node each", "two a node", "nodes are faster"],
)
def test_the_slower_of_two_flows_counts(group: Group, seconds: float) -> None:
    assert all_gather_s(CLUSTER, group, 8e9) == pytest.approx(seconds)
    assert all_reduce_s(CLUSTER, group, 8e9) == pytest.approx(2 * seconds)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [(Group(1, 1), 0.0), (Group(8, 8), 0.14), (Group(8, 4), 0.8), (Group(8, 1), 1.4)],
)
def test_an_all_to_all_sends_as_much_to_each(group: Group, seconds: float) -> None:
    """7 GB to seven others, at half of the rates: 1 GB each over 50 GB/s or 5 GB/s, both at once."""
    assert all_to_all_s(CLUSTER, group, 7e9) == pytest.approx(seconds)


def test_messages_between_nodes_take_their_links() -> None:
    assert point_to_point_s(CLUSTER, False, 1e9) == pytest.approx(0.01)
    assert point_to_point_s(CLUSTER, True, 1e9) == pytest.approx(0.1)


@pytest.mark.parametrize(("under", "left"), [(0.0, 10.0), (5.0, 8.0), (100.0, 6.0)])
def test_what_overlaps_is_saved_in_part(under: float, left: float) -> None:
    """0.4 of what goes on under computation."""
    assert exposed_s(CLUSTER, 10.0, under) == pytest.approx(left)
