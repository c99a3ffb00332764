"""Every layout computes what one process computes, and `verify` sees it where one does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import verify_on_ranks as on_ranks
from experiments import MOE, experiment, layout
from layout_cases import LAYOUTS, SECOND_PAIR, verify

from megatron_moe.training.verify import without_draws


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.second_pair if name in SECOND_PAIR else ()) for name in LAYOUTS],
)
def test_layout_computes_what_one_process_computes(tmp_path: Path, name: str) -> None:
    assert verify(tmp_path, **LAYOUTS[name]).failures == []


@pytest.mark.second_pair
@pytest.mark.parametrize(
    "parallel", [layout(tp=2), layout(tp=2, pp=2), layout(cp=2)], ids=["EDP", "EDP PP2", "CP2"]
)
def test_later_steps_agree_too(tmp_path: Path, parallel: dict[str, Any]) -> None:
    report = verify(tmp_path, parallel, steps=3)
    assert report.failures == []
    assert [step.number for step in report.steps] == [1, 2, 3]
    assert len({step.loss for step in report.steps}) == 3


def test_biases_without_a_gradient_may_move_by_chance(tmp_path: Path) -> None:
    """Without rotary positions a bias of the keys changes nothing."""
    model = {"position_embedding_type": "learned_absolute", "qkv_bias": True}
    report = verify(tmp_path, layout(tp=2), steps=3, model=model)
    assert report.failures == []


@pytest.mark.parametrize(
    "parallel",
    [layout(tp=2), layout(cp=2), layout(dp=2), layout(pp=2)],
    ids=["EDP", "CP2", "DP2", "PP2"],
)
def test_padding_counts_the_same_in_every_layout(tmp_path: Path, parallel: dict[str, Any]) -> None:
    assert verify(tmp_path, parallel, padded=True).failures == []


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
PER_TOKEN = {"calculate_per_token_loss": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "EDP DP2, overlapped, loss a token": {
        "parallel": layout(tp=2, dp=2, **OVERLAP),
        "training": PER_TOKEN,
        "recompute": {"modules": ["layernorm", "moe_act"]},
    },
    "PP2 VPP2 DP2, overlapped, loss a token": {
        "parallel": layout(pp=2, vpp=2, dp=2, **OVERLAP),
        "training": PER_TOKEN,
        "moe": {**MOE, "moe_layer_freq": 2},
        "recompute": {"modules": ["core_attn", "mlp", "moe"]},
    },
    "CP2 EP2, loss a token": {
        "parallel": layout(cp=2, expert_model_parallel_size=2),
        "training": PER_TOKEN,
        "recompute": {"granularity": "full"},
    },
}


@pytest.mark.second_pair
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_engine_with_padding(name: str, tmp_path: Path) -> None:
    report = verify(tmp_path, steps=2, padded=True, **OPTIONS[name])
    assert report.failures == []


def test_bf16_is_held_at_the_first_step(tmp_path: Path) -> None:
    report = verify(tmp_path, layout(tp=2), steps=2, training={"precision": "bf16"})
    assert report.failures == []
    assert report.steps[0].gradients.difference > 1e-5, "bf16 rounds"


@pytest.mark.second_pair
def test_a_doubled_gradient_is_found_and_its_expert_named(tmp_path: Path) -> None:
    report = verify(tmp_path, layout(tp=2), fault=on_ranks.double_an_experts_gradient)
    worst = report.steps[0].gradients
    assert worst.name == "decoder.layers.2.mlp.experts.experts.linear_fc2.weight[expert 3]"
    assert worst.difference == pytest.approx(1.0, rel=1e-4)
    assert worst.rank == 1
    assert any(worst.name in failure for failure in report.failures)


@pytest.mark.parametrize(
    ("fault", "moe", "name"),
    [
        (
            on_ranks.keep_a_norms_gradient_apart,
            None,
            "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        ),
        (on_ranks.keep_a_routers_gradient_apart, MOE, "decoder.layers.1.mlp.router.weight"),
    ],
    ids=["norm", "router"],
)
def test_a_gradient_that_is_not_summed_is_found_and_named(
    tmp_path: Path, fault: on_ranks.Change, moe: dict[str, Any] | None, name: str
) -> None:
    report = verify(tmp_path, layout(tp=2), fault=fault, moe=moe)
    assert report.steps[0].gradients.name == name
    assert report.steps[0].gradients.difference > 0.1
    assert not report.passed


def test_a_router_that_differs_between_ranks_is_found_before_the_first_step(tmp_path: Path) -> None:
    report = verify(tmp_path, layout(tp=2), fault=on_ranks.change_one_ranks_router)
    assert (report.at_start.name, report.at_start.rank) == ("decoder.layers.1.mlp.router.weight", 1)
    assert "before step 1: decoder.layers.1.mlp.router.weight (rank 1)" in report.failures[0]
    assert not report.steps[0].gradients.difference < 1e-3, "and its consequences show"


def test_a_reduction_left_out_is_found_in_the_loss(tmp_path: Path) -> None:
    parallel = layout(tp=2, sequence_parallel=False)
    report = verify(tmp_path, parallel, fault=on_ranks.leave_out_a_reduction, moe=None)
    assert report.failures[0].startswith("step 1: the loss differs by ")


def test_a_wrong_update_of_right_gradients_is_found(tmp_path: Path) -> None:
    report = verify(tmp_path, layout(tp=2), fault=on_ranks.decay_one_ranks_weights_more)
    step = report.steps[0]
    assert step.gradients.difference < 1e-5
    assert step.updates.rank == 1
    assert report.failures == [failure for failure in report.failures if "the update of" in failure] != []


def test_what_draws_random_numbers_is_switched_off_and_named() -> None:
    """Not what routers draw: it is the same in every layout."""
    moe = {**MOE, "moe_expert_dropout": 0.2, "moe_input_jitter_eps": 0.01}
    changed, names = without_draws(experiment(model={"hidden_dropout": 0.1}, moe=moe))
    assert changed.moe is not None and changed.moe.moe_expert_dropout == 0.0
    assert changed.model.hidden_dropout == 0.0
    assert changed.moe.moe_input_jitter_eps == 0.01
    assert names == ["model.hidden_dropout", "moe.moe_expert_dropout"]
