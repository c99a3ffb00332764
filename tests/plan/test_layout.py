"""The grid of ranks against Megatron-Core's own generator, and what must hold for every layout."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.plan.layout import GROUP_KINDS, Layout

SIZES = st.sampled_from([1, 2, 3, 4])
MEGATRON_TOKENS = {
    "tp": "tp",
    "pp": "pp",
    "cp": "cp",
    "dp": "dp",
    "dp_cp": "dp-cp",
    "tp_cp": "tp-cp",
    "tp_dp_cp": "tp-dp-cp",
}
MEGATRON_EXPERT_TOKENS = {"ep": "ep", "expert_tp": "tp", "expert_dp": "dp", "tp_ep": "tp-ep"}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp, pp, cp, dp = (draw(SIZES) for _ in range(4))
    ranks = tp * cp * dp
    etp = draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
    ep = draw(st.sampled_from([size for size in range(1, ranks // etp + 1) if ranks // etp % size == 0]))
    return Layout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=1,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        data_parallel_size=dp,
    )


@pytest.mark.second_pair
@settings(max_examples=150)
@given(layouts())
def test_groups_are_those_of_megatron_cores_rank_generator(layout: Layout) -> None:
    # Imported here, so that the other tests of this file run without torch.
    from megatron.core import parallel_state

    attention = parallel_state.RankGenerator(
        tp=layout.tensor_model_parallel_size,
        ep=1,
        dp=layout.data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=layout.context_parallel_size,
        order="tp-cp-ep-dp-pp",
    )
    experts = parallel_state.RankGenerator(
        tp=layout.expert_tensor_parallel_size,
        ep=layout.expert_model_parallel_size,
        dp=layout.expert_data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=1,
        order="tp-cp-ep-dp-pp",
    )
    for kind, token in MEGATRON_TOKENS.items():
        assert layout.groups(kind) == attention.get_ranks(token), kind
    for kind, token in MEGATRON_EXPERT_TOKENS.items():
        assert layout.groups(kind) == experts.get_ranks(token), kind
    assert layout.groups("embedding") == [
        parallel_state.default_embedding_ranks(ranks) for ranks in attention.get_ranks("pp")
    ]


@given(layouts())
def test_every_rank_is_in_one_group_of_each_kind_at_its_coordinate(layout: Layout) -> None:
    for kind in GROUP_KINDS:
        members = [rank for group in layout.groups(kind) for rank in group]
        assert len(members) == len(set(members)), kind
        if kind != "embedding":
            assert set(members) == set(range(layout.world_size)), kind
    for axis in ("tp", "cp", "dp", "pp", "expert_tp", "ep", "expert_dp"):
        for group in layout.groups(axis):
            positions = [getattr(layout.coordinates(rank), axis) for rank in group]
            assert positions == list(range(len(group))), axis


@given(layouts(), st.integers(1, 4))
def test_each_expert_lies_once_in_each_expert_parallel_group(layout: Layout, per_rank: int) -> None:
    num_experts = per_rank * layout.expert_model_parallel_size
    for group in layout.groups("ep"):
        held = [expert for rank in group for expert in layout.experts_of(rank, num_experts)]
        assert held == list(range(num_experts))
    for kind in ("expert_tp", "expert_dp"):
        for group in layout.groups(kind):
            assert len({layout.experts_of(rank, num_experts) for rank in group}) == 1


def test_edp_folds_the_experts_over_the_tensor_parallel_ranks() -> None:
    """Skywork-MoE's Expert Data Parallelism: EP = TP on the same ranks, expert replicas = data parallel."""
    layout = Layout(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=12,
        virtual_pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        data_parallel_size=32,
    )
    assert layout.world_size == 1536
    assert layout.groups("ep") == layout.groups("tp")
    assert layout.groups("expert_dp") == layout.groups("dp")
