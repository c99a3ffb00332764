"""What the experiment says reaches Megatron-Core's config; what that refuses is the user's to mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experiments import MOE, experiment

from megatron_moe.config.errors import InputError
from megatron_moe.model import transformer_config as module
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.plan import plan as plans


def config(**sections: Any) -> Any:
    setup = experiment(**sections)
    return transformer_config(setup, plans.make(setup), 0, torch.float32)


def with_fields(**fields: Any) -> Any:
    return config(model={"megatron_core": fields})


@pytest.mark.second_pair
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "moe_router_num_groups: 3"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias: True"),
        ({"qk_l2_norm": True, "no_such_field": 1}, "no_such_field"),
    ],
    ids=["ValueError", "another ValueError", "TypeError"],
)
def test_what_megatron_core_refuses_is_an_input_error(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        with_fields(**fields)
    (problem,) = caught.value.problems
    assert problem.startswith("model.megatron_core (") and named in problem
    assert "\n" not in problem and "leave out" in problem


def test_a_mistake_of_ours_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fields of the user's there is nothing that he could mend."""
    monkeypatch.setattr(module, "_moe_fields", lambda setup: {"no_such_field": 1})
    with pytest.raises(TypeError, match="no_such_field"):
        config()


@pytest.mark.second_pair
def test_fields_of_the_user_are_passed_on() -> None:
    assert (
        with_fields(qk_l2_norm=True, moe_router_topk_scaling_factor=2.5).moe_router_topk_scaling_factor == 2.5
    )


@pytest.mark.second_pair
def test_pipeline_ranks_recompute_their_own_number_of_layers() -> None:
    setup = experiment(
        parallel={"pipeline_model_parallel_size": 2},
        pipeline={"layers_per_stage": [1, 3]},
        recompute={"layers_per_stage": [0, 2]},
    )
    plan = plans.make(setup)
    first, last = (transformer_config(setup, plan, rank, torch.float32) for rank in range(2))
    assert first.recompute_granularity is None
    assert (last.recompute_granularity, last.recompute_method, last.recompute_num_layers) == (
        "full",
        "block",
        2,
    )


def test_many_experts_bring_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Of routers that compute in bf16: ours don't."""
    config(moe={**MOE, "num_moe_experts": 64})
    assert [str(warning.message) for warning in recwarn if "experts" in str(warning.message)] == []


def test_moe_fields_are_left_out_of_dense_models() -> None:
    assert config(moe=None).num_moe_experts is None
    assert config(moe=MOE).num_moe_experts == 4
