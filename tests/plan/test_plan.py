"""The plan file: round trip, and what other programs read from it."""

from __future__ import annotations

import json

import pytest
from plan_experiments import filled

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
