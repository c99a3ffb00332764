"""What is decayed, and that each replica holds its part of the state."""

from __future__ import annotations

import optimizer_on_ranks
import pytest
from distributed import ranks
from experiments import MOE, experiment, layout

pytestmark = pytest.mark.second_pair


def test_norms_and_biases_are_not_decayed() -> None:
    setup = experiment(
        model={
            "normalization": "LayerNorm",
            "mlp_bias": True,
            "qkv_bias": True,
            "attention_output_bias": True,
        },
        optimizer={"lr": 1e-2, "weight_decay": 0.3},
    )
    decays = ranks(1).run(optimizer_on_ranks.decay_by_name, setup)[0]
    spared = {name for name, decay in decays.items() if decay == 0.0}
    assert spared == {name for name in decays if "norm" in name or name.endswith("bias")}
    assert spared and {decays[name] for name in decays.keys() - spared} == {0.3}
    assert any("experts" in name for name in decays.keys() - spared)
    assert any("experts" in name for name in spared), "experts have biases too"


def test_state_is_spread_over_the_replicas() -> None:
    whole = ranks(1).run(optimizer_on_ranks.sizes_of_state, experiment(moe=MOE))[0]
    halves = ranks(2).run(optimizer_on_ranks.sizes_of_state, experiment(moe=MOE, parallel=layout(dp=2)))
    assert sum(halves) == whole
    assert all(abs(half - whole / 2) < whole / 20 for half in halves)
