"""Recomputed modules run again, save memory, and change nothing else."""

from __future__ import annotations

from typing import Any

import overlap_on_ranks
import pytest
import recompute_on_ranks as on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout

BOTH_KINDS = {**MOE, "moe_layer_freq": [0, 1, 1, 1], "moe_shared_expert_intermediate_size": 32}
LAYERS = {"core_attn": 4, "layernorm": 8, "moe_act": 3, "mlp": 1, "moe": 3, "shared_experts": 3}
"""Times that each module runs in the forward pass of one microbatch."""


def made(modules: list[str]):
    """With dropout: experts that have none keep no activations on a host, recomputed or not."""
    return experiment(moe={**BOTH_KINDS, "moe_expert_dropout": 0.1}, recompute={"modules": modules})


@pytest.mark.second_pair
def test_each_module_runs_again_and_saves_memory(tmp_path):
    pool = ranks(1)
    plain, bytes_of_all = pool.run(on_ranks.counted, made([]), tmp_path)[0]
    assert plain == LAYERS
    for module in LAYERS:
        calls, kept_bytes = pool.run(on_ranks.counted, made([module]), tmp_path)[0]
        parts = ("moe_act", "shared_experts") if module == "moe" else ()
        again = {name: count for name, count in LAYERS.items() if name in (module, *parts)}
        assert calls == plain + on_ranks.Counter(again), module
        assert kept_bytes < bytes_of_all, module


OTHERWISE: dict[str, dict[str, Any]] = {
    "parts of layers": {"modules": ["core_attn", "moe_act", "mlp", "shared_experts"]},
    "moe": {"modules": ["moe"]},
    "full": {"granularity": "full"},
    "full, uniform": {"granularity": "full", "method": "uniform"},
}
EVALUATED = {"eval_interval": 1, "eval_iters": 1}


@pytest.mark.second_pair
@pytest.mark.parametrize("name", OTHERWISE)
def test_nothing_changes(name, tmp_path):
    """Losses, gradients, weights and metrics, with dropout, drops and a loss on held-out data, to the bit."""
    sections: dict[str, Any] = {
        "moe": {**BOTH_KINDS, "moe_expert_capacity_factor": 1.0},
        "parallel": layout(pp=2),
        "model": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
        "training": EVALUATED,
    }
    plain, changed = experiment(**sections), experiment(**sections, recompute=OTHERWISE[name])
    for found in ranks(2).run(overlap_on_ranks.compare, plain, changed, tmp_path, 2):
        assert found == overlap_on_ranks.Apart(0, 0, 0, 0, 0, buckets=found.buckets)


@pytest.mark.second_pair
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_norms_change_by_rounding(precision, tmp_path):
    """The gradients of a norm's input are summed in another order."""
    sections = {"moe": BOTH_KINDS, "training": EVALUATED | {"precision": precision}}
    plain, changed = (
        experiment(**sections, recompute={"modules": m}) for m in ([], ["layernorm", "moe_act"])
    )
    (found,) = ranks(1).run(overlap_on_ranks.compare, plain, changed, tmp_path, 1)
    assert found.loss == 0
    assert found.gradients < (1e-4 if precision == "fp32" else 1e-1)
    assert found.grad_norm < (1e-6 if precision == "fp32" else 1e-3)
