"""Ranks whose experts get no token, microbatches of nothing but padding, fewer tokens than experts: each
computes what one process computes, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import empty_on_ranks
import pytest
import verify_on_ranks as on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout

from megatron_moe.plan.layout import Layout

EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {"EDP": layout(tp=2), "EP2 over DP2": layout(dp=2, **EP2), "CP2 EP2": layout(cp=2, **EP2)}


def failures(
    folder: Path, parallel: dict[str, Any], change: on_ranks.Change | None, **sections: Any
) -> list[str]:
    """As `verify` does, with the same change on both sides."""
    under_layout = experiment(parallel=parallel, **sections)
    alone = experiment(parallel=layout(dp=1, expert_model_parallel_size=1), **sections)
    world = Layout.of(under_layout).world_size
    ranks(world).run(on_ranks.layout_part, under_layout, 1, folder, change)
    (report,) = ranks(1).run(on_ranks.reference_part, alone, 1, folder, None, change)
    return report.failures


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "moe",
    [
        {},
        {
            "moe_expert_capacity_factor": 1.0,
            "moe_pad_expert_input_to_capacity": True,
            "moe_token_drop_policy": "batch_priority",
        },
    ],
    ids=["dropless", "filled up"],
)
def test_a_rank_without_tokens(tmp_path: Path, name: str, moe: dict[str, Any]) -> None:
    """All tokens go to experts 0 and 1 of 4: the second rank of EP2 has none to compute."""
    change = empty_on_ranks.all_to_the_first_experts
    assert failures(tmp_path, LAYOUTS[name], change, moe=MOE | moe) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_microbatches_of_padding_only(tmp_path: Path, name: str) -> None:
    moe = MOE | {"moe_expert_capacity_factor": 1.0}
    sections = {"moe": moe, "training": {"micro_batch_size": 1}}
    assert failures(tmp_path, LAYOUTS[name], empty_on_ranks.only_padding, **sections) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_fewer_tokens_than_experts(tmp_path: Path, name: str) -> None:
    """4 tokens, 16 experts, 3 a token: some rank's experts have none, and no expert has two places."""
    moe = MOE | {"num_moe_experts": 16, "moe_router_topk": 3, "moe_expert_capacity_factor": 1.0}
    sections = {"moe": moe, "training": {"micro_batch_size": 1, "seq_length": 4}}
    assert failures(tmp_path, LAYOUTS[name], None, **sections) == []


@pytest.mark.parametrize("factor", [None, 1.0], ids=["dropless", "drops"])
def test_what_is_said_of_an_empty_rank(factor: float | None) -> None:
    """All tokens want experts 0 and 1 of 4: half of the experts are dead, the others have twice the mean, and
    with room for the mean exactly half of the assignments is (or would be) dropped. So the coefficient goes
    from 0.01 to 0.99 * 0.01 + 0.01 * min(0.01 * 0.5, 1)."""
    coefficient = {"initial": 0.01, "xi": 0.01, "maximum": 1.0, "beta": 0.99}
    moe = MOE | {"moe_expert_capacity_factor": factor, "moe_aux_loss_coeff": coefficient}
    setup = experiment(moe, parallel=layout(tp=2), logging={"detail_interval": 1})
    rate = "would_drop_rate" if factor is None else "drop_rate"
    for first, second in ranks(2).run(empty_on_ranks.steps_to_the_first_experts, setup, Path()):
        assert first["moe/dead_experts"] == 8 and first["moe/per_layer/dead_experts"] == [2] * 4
        assert first["moe/load_max_over_mean"] == 2.0
        assert first[f"moe/{rate}"] == 0.5 and first[f"moe/per_layer/{rate}"] == [0.5] * 4
        assert first["moe/drop_rate"] == (0 if factor is None else 0.5)
        assert first["moe/per_layer/aux_loss_coeff"] == [0.01] * 4
        assert second["moe/per_layer/aux_loss_coeff"] == pytest.approx([0.99 * 0.01 + 0.01 * 0.005] * 4)


def test_a_batch_of_padding_only_has_no_figures() -> None:
    """No token: shares of nothing are not there, and dead experts are all of them."""
    setup = experiment(MOE, parallel=layout(tp=2), training={"micro_batch_size": 1, "global_batch_size": 1})
    records = ranks(2).run(empty_on_ranks.steps_some_without_targets, setup, Path())
    for full, empty in records:
        assert full["loss"] is not None and empty["loss"] is None
        assert empty["moe/dead_experts"] == 16
        assert empty["moe/aux_loss"] == 0.0
        assert all(value != value for value in (empty["moe/drop_rate"], empty["moe/router_entropy"]))
