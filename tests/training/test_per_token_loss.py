"""`training.calculate_per_token_loss`: every target of the global batch weighs the same."""

from __future__ import annotations

import overlap_on_ranks
import per_token_on_ranks as on_ranks
import pytest
from distributed import ranks
from experiments import MOE, experiment, layout

PER_TOKEN = {"calculate_per_token_loss": True}


@pytest.mark.second_pair
def test_gradients_are_those_of_the_mean_over_all_targets(tmp_path):
    moe = {**MOE, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1, "moe_router_dtype": "fp64"}
    made = experiment(moe=moe, training=PER_TOKEN)
    differences = ranks(1).run(on_ranks.against_float64, made, tmp_path)[0]
    assert max(differences.values()) < 1e-5, differences


def test_the_default_weighs_targets_beside_padding_more(tmp_path):
    differences = ranks(1).run(on_ranks.against_float64, experiment(), tmp_path)[0]
    assert max(differences.values()) > 1e-2


def test_without_padding_it_is_the_default_to_the_bit(tmp_path):
    evaluated = {"eval_interval": 1, "eval_iters": 1}
    plain = experiment(parallel=layout(tp=2), training=evaluated)
    changed = experiment(parallel=layout(tp=2), training=evaluated | PER_TOKEN)
    for found in ranks(2).run(overlap_on_ranks.compare, plain, changed, tmp_path, 2):
        assert found == overlap_on_ranks.Apart(0, 0, 0, 0, 0, found.buckets)
