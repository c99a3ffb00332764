"""What travels while something else is computed arrives as what it would have been: to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import overlap_on_ranks as on_ranks
import pytest
from distributed import ranks
from experiments import MOE, experiment, layout

from megatron_moe.plan import plan

EIGHT = {**MOE, "num_moe_experts": 8}
SHARED = {**EIGHT, "moe_shared_expert_intermediate_size": 32}
EDP, EP2 = layout(tp=2), layout(dp=2, expert_model_parallel_size=2)
SMALL = 3000


def apart(
    folder: Path, parallel: Any, moe: Any, options: Any, steps: int = 2, **sections: Any
) -> on_ranks.Apart:
    sections["training"] = {
        "eval_interval": 1,
        "eval_iters": 1,
        "precision": sections.pop("precision", "fp32"),
    }
    sections["logging"] = {"detail_interval": 1}
    plain = experiment(parallel=parallel, moe=moe, **sections)
    hidden = experiment(parallel=parallel, moe={**moe, **options}, **sections)
    # Small buckets of gradients and weights: some are still under way when experts begin.
    size = SMALL if "overlap_grad_reduce" in parallel else None
    found = ranks(plan.make(plain).layout.world_size).run(
        on_ranks.compare, plain, hidden, folder, steps, size
    )
    names = ("loss", "grad_norm", "gradients", "weights", "held_out", "buckets", "metrics")
    return on_ranks.Apart(**{name: max(getattr(one, name) for one in found) for name in names})


@pytest.mark.parametrize(
    ("parallel", "moe", "options", "recompute"),
    [
        pytest.param(EDP, EIGHT, {"moe_overlap_degree": 2}, {}, id="EDP"),
        pytest.param(
            EP2,
            {**EIGHT, "moe_expert_capacity_factor": 0.7},
            {"moe_overlap_degree": 4},
            {"layers_per_stage": [4]},
            id="EP2, drops, everything recomputed",
        ),
        pytest.param(
            EDP,
            SHARED,
            {"moe_overlap_degree": 3, "moe_shared_expert_overlap": True},
            {"granularity": "selective", "modules": ["moe", "moe_act"]},
            id="EDP, shared experts, some recomputed",
        ),
        pytest.param(
            layout(tp=2, dp=2, overlap_grad_reduce=True, overlap_param_gather=True),
            SHARED,
            {"moe_overlap_degree": 4, "moe_shared_expert_overlap": True},
            {},
            id="EDP, weights gathered meanwhile",
        ),
        pytest.param(EDP, SHARED, {"moe_shared_expert_overlap": True}, {}, id="EDP, shared experts alone"),
        pytest.param(
            EDP,
            {**SHARED, "moe_token_dispatcher_type": "allgather"},
            {"moe_shared_expert_overlap": True},
            {},
            id="EDP, gathered, shared experts",
        ),
    ],
)
def test_a_hidden_exchange_changes_no_bit(
    tmp_path: Path, parallel: Any, moe: Any, options: Any, recompute: Any
) -> None:
    found = apart(tmp_path, parallel, moe, options, recompute=recompute)
    assert found == on_ranks.Apart(0, 0, 0, 0, 0, buckets=found.buckets)


def test_more_parts_than_experts_change_the_order_of_sums_only(tmp_path: Path) -> None:
    found = apart(tmp_path, EDP, {**MOE, "num_moe_experts": 2}, {"moe_overlap_degree": 2})
    assert 0 < found.gradients < 1e-5 and found.loss < 1e-6


@pytest.mark.parametrize(
    ("parallel", "experts"),
    [
        pytest.param(EDP, 4, id="EDP"),
        pytest.param(layout(tp=2, pp=2, vpp=2), 2, id="EDP PP2 VPP2, one expert a rank"),
    ],
)
@pytest.mark.second_pair
def test_two_microbatches_at_once_compute_what_one_after_the_other_does(
    tmp_path: Path, parallel: Any, experts: int
) -> None:
    """Megatron-Core adds up the experts of a token in another order, in bf16. Each token goes to all experts,
    so that rounding sends none elsewhere."""
    moe = {**SHARED, "num_moe_experts": experts, "moe_router_topk": experts}
    options = {"overlap_moe_expert_parallel_comm": True}
    found = apart(tmp_path, parallel, moe, options, precision="bf16", steps=1)
    assert found.loss < 1e-4 and found.grad_norm < 1e-3 and found.gradients < 0.03


def test_it_is_measured_what_was_exposed(tmp_path: Path) -> None:
    """Every second step says how long tokens travelled, and how much of that the ranks waited for."""
    made = experiment(
        parallel=EDP,
        moe={
            **EIGHT,
            "moe_overlap_degree": 2,
            "moe_shadowing": {"flops_per_second": 1e6, "bytes_per_second": 1e12},
        },
        logging={"detail_interval": 2},
        training={"eval_interval": 1, "eval_iters": 1},
    )
    for seen in ranks(2).run(on_ranks.watch, made, tmp_path, 4):
        assert ["moe/communication_ms" in record for record in seen.records] == [False, True] * 2
        assert all(0 < record["moe/shadowed_experts"] <= 2 for record in seen.records)
        for record in seen.records[1::2]:
            exposed, all_of_it = record["moe/exposed_communication_ms"], record["moe/communication_ms"]
            assert exposed > 0 and 0 < all_of_it <= 1000 * record["step_time_s"]
