"""Overlapped communication of the replicas changes neither gradients nor weights, wherever they are read."""

from __future__ import annotations

from typing import Any

import overlap_on_ranks as on_ranks
import pytest
from distributed import ranks
from experiments import experiment, layout

from megatron_moe.plan import plan

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SMALL = 3000
"""Numbers a bucket: the tiny models of these tests have several."""


def apart(folder: Any, parallel: dict[str, Any], options: dict[str, Any], **sections: Any) -> on_ranks.Apart:
    bucket_size, steps = sections.pop("bucket_size", None), sections.pop("steps", 3)
    sections["training"] = {"eval_interval": 1, "eval_iters": 1} | sections.get("training", {})
    plain = experiment(parallel=parallel, **sections)
    changed = experiment(parallel=parallel | options, **sections)
    pool = ranks(plan.make(plain).layout.world_size)
    found = pool.run(on_ranks.compare, plain, changed, folder, steps, bucket_size)
    names = ("loss", "grad_norm", "gradients", "weights", "held_out", "buckets", "metrics")
    return on_ranks.Apart(**{name: max(getattr(one, name) for one in found) for name in names})


def test_one_bucket_to_the_bit(tmp_path):
    found = apart(tmp_path, layout(dp=2), OVERLAP)
    assert found == on_ranks.Apart(0, 0, 0, 0, 0, buckets=1)


def test_it_overlaps(tmp_path):
    """Reductions start before the backward pass ends, gathers after the update, when a module needs them."""
    made = experiment(parallel=layout(dp=2, **OVERLAP))
    for early_reductions, buckets, stale in ranks(2).run(on_ranks.overlapped, made, tmp_path, SMALL):
        # One bucket holds what the last part of the backward pass computes.
        assert early_reductions >= buckets - 1 > 1
        assert stale


def test_bf16_gradients_are_reduced_in_bf16_on_request_only(tmp_path):
    """In fp32 there is nothing that could be reduced with fewer digits."""
    narrow = {"grad_reduce_in_fp32": False}
    found = apart(tmp_path, layout(dp=2), narrow)
    assert found == on_ranks.Apart(0, 0, 0, 0, 0, buckets=1)
    found = apart(tmp_path, layout(dp=2), narrow | OVERLAP, training={"precision": "bf16"})
    assert found.loss < 0.02 and found.held_out < 0.02
    assert found.gradients > 1e-4, "bf16 rounds"


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"parallel": layout(dp=2)},
    "DP2, gradients only": {"parallel": layout(dp=2), "options": {"overlap_grad_reduce": True}},
    "EDP, two replicas of the experts": {"parallel": layout(tp=2, dp=2)},
    "PP2 DP2, tied embeddings": {
        "parallel": layout(pp=2, dp=2),
        "model": {"untie_embeddings_and_output_weights": False},
    },
    "PP2 VPP2 DP2, full recompute": {
        "parallel": layout(pp=2, vpp=2, dp=2),
        "recompute": {"layers_per_stage": [1, 1]},
    },
    "CP2 EP2": {"parallel": layout(cp=2, dp=1, expert_model_parallel_size=2)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_many_buckets(name, tmp_path):
    """Sums of two are equal to the bit; the norm of the gradients is summed over other shards."""
    sections = dict(LAYOUTS[name])
    options = sections.pop("options", OVERLAP)
    found = apart(tmp_path, sections.pop("parallel"), options, bucket_size=SMALL, **sections)
    assert found.buckets > 1
    assert found.gradients < 1e-5 and found.weights < 1e-5
    assert max(found.loss, found.grad_norm, found.held_out) < 1e-6
