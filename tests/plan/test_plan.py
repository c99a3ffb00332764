"""The plan file: round trip, and what other programs read from it."""

from __future__ import annotations

import json

import pytest
from experiments import MOE, experiment, layout
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_experiments import filled

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.plan import Plan, make

FOUR_RANKS = filled(
    parallel={
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
    },
    pipeline={"layers_per_stage": [3, 1]},
    recompute={"layers_per_stage": [2, 0]},
)


@pytest.mark.parametrize("experiment", [FOUR_RANKS, filled(), filled(moe=None)], ids=["EDP", "one", "dense"])
def test_a_plan_survives_its_file(experiment: Experiment) -> None:
    plan = make(experiment)
    assert Plan.from_json(plan.to_json()) == plan


def test_the_file_tells_other_programs_the_numbers() -> None:
    record = json.loads(make(FOUR_RANKS).to_json())
    assert record["world_size"] == 4
    assert record["parameters"]["active"] < record["parameters"]["total"]
    assert all(type(record["parameters"][key]) is int for key in ("total", "active"))
    assert record["groups"]["ep"] == [[0, 1], [2, 3]]
    assert record["experts_of_rank"] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert [stage["layers"] for stage in record["stages"]] == [[0, 1, 2], [3]]
    assert [stage["recomputed"] for stage in record["stages"]] == [2, 0]


def test_a_rank_finds_its_stages_and_experts() -> None:
    plan = make(FOUR_RANKS)
    assert [stage.layers for stage in plan.stages_on(3)] == [(3,)]
    assert plan.experts_on(3) == range(4, 8)
    assert list(make(filled(moe=None)).experts_on(0)) == []


_SIZE = st.sampled_from([1, 1, 2, 3, 4])


@given(st.data())
def test_what_validation_accepts_is_planned_in_full(data: st.DataObject) -> None:
    """Every layer on one stage, every expert of each stage as often as it has replicas, every parameter on
    some rank: for whatever sizes the rules let through."""
    tp, pp, cp, ep, etp = (data.draw(_SIZE, name) for name in ("TP", "PP", "CP", "EP", "ETP"))
    dp, vpp = data.draw(st.sampled_from([None, 1, 2, 4]), "DP"), data.draw(st.sampled_from([None, 2]), "VPP")
    split = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=pp, max_size=2 * pp), "layers")
    biases = data.draw(st.booleans(), "biases")
    try:
        setup = experiment(
            parallel=layout(
                tp, pp, vpp, cp, dp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
            ),
            pipeline={"layers_per_stage": split},
            model={
                "num_layers": sum(split) if split and sum(split) else 12,
                "num_attention_heads": 12,
                "num_query_groups": data.draw(st.sampled_from([1, 2, 4, 12]), "key heads"),
                "kv_channels": 8,
                "hidden_size": 48,
                "vocab_size": 384,
                "ffn_hidden_size": 96,
                "mlp_bias": biases,
            },
            moe={**MOE, "num_moe_experts": 12, "moe_layer_freq": data.draw(st.integers(1, 3), "every")},
            training={"global_batch_size": 48, "micro_batch_size": 1, "seq_length": 48},
        )
    except ConfigError:
        assume(False)
    assume(not violations(setup))
    plan = make(setup)
    assert plan.layout.world_size == tp * pp * cp * plan.layout.data_parallel_size
    layers = [layer for stage in plan.stages for layer in stage.layers]
    assert layers == list(range(setup.model.num_layers))
    for pipeline_rank in range(pp):
        held = [expert for rank in _ranks_of(plan, pipeline_rank) for expert in plan.experts_on(rank)]
        copies = etp * plan.layout.expert_data_parallel_size
        assert sorted(held) == [expert for expert in range(12) for _ in range(copies)]
    one_copy = sum(cost.parameters_per_rank for cost in plan.stage_costs)
    assert one_copy * tp * max(ep * etp, 1) >= plan.parameters.total
    assert Plan.from_json(plan.to_json()) == plan


def _ranks_of(plan: Plan, pipeline_rank: int) -> list[int]:
    return [
        rank for rank in range(plan.layout.world_size) if plan.layout.coordinates(rank).pp == pipeline_rank
    ]
