"""Runs with frozen weights or adapters go on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import train_on_ranks as on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout
from training_runs import assert_same, checkpoint, copy_until, records, tensors

SHARED = {**MOE, "moe_shared_expert_intermediate_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "a frozen stage, tied, bf16": {
        "parallel": layout(pp=2),
        "model": {"untie_embeddings_and_output_weights": False},
        "training": {"precision": "bf16", "freeze": ["embeddings", "decoder.layers.[01].*"]},
    },
    "experts only, EP2": {
        "parallel": layout(dp=2, expert_model_parallel_size=2),
        "training": {"freeze": ["attention", "router", "norms", "embeddings", "output", "shared_experts"]},
    },
    "adapters, EDP, bf16, dropout": {
        "parallel": layout(tp=2),
        "training": {
            "precision": "bf16",
            "lora": {"rank": 4, "dropout": 0.1, "targets": ["attention", "shared_experts"]},
        },
    },
    "adapters of experts, ETP2": {
        "parallel": layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2),
        "training": {"lora": {"rank": 4, "targets": ["experts"]}},
    },
}


@pytest.mark.second_pair
@pytest.mark.parametrize("name", CASES)
def test_to_the_bit(tmp_path: Path, name: str) -> None:
    case = dict(CASES[name])
    training = {"train_iters": 4, "global_batch_size": 4, **case.pop("training")}
    made = experiment(SHARED, training=training, checkpoint={"save_interval": 2}, **case)
    whole = tmp_path / "whole"
    assert ranks(2).run(on_ranks.train, made, whole) == [0, 0]
    broken = copy_until(whole, tmp_path / "broken", 2)
    assert ranks(2).run(on_ranks.train, made, broken) == [2, 2]
    assert records(broken) == records(whole)
    assert_same(tensors(checkpoint(broken, 4)), tensors(checkpoint(whole, 4)))
