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
def test_keys_of_the_model_in_megatrons_words() -> None:
    """Its window counts the tokens before, and a softmax scale holds what YaRN multiplies queries and keys
    by."""
    yarn = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.5}
    found = config(
        model={
            "kv_channels": 16,
            "sliding_window": 128,
            "window_attn_skip_freq": 2,
            "attention_sinks": True,
            "qk_norm": "head",
            "mlp_bias": True,
            "activation": "clamped_swiglu",
            "rotary_scaling": yarn,
        }
    )
    assert (found.window_size, found.window_attn_skip_freq) == ((127, 0), 2)
    assert (found.softmax_type, found.qk_layernorm, found.add_bias_linear) == ("learnable", True, True)
    assert (found.activation_func_clamp_value, found.glu_linear_offset) == (7.0, 1.0)
    assert found.softmax_scale == pytest.approx(1.5**2 / 4)
    plain = config()
    assert (plain.window_size, plain.softmax_type, plain.softmax_scale) == (None, "vanilla", None)
    assert not (plain.qk_layernorm or plain.qk_l2_norm or plain.add_bias_linear)


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
