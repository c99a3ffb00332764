"""The similarity of experts is the mean cosine of all pairs, the same number in every layout."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_on_ranks as on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout
from training_runs import checkpoint, records

from megatron_moe.engine.weight_files import CheckpointWeights

KEY = "moe/per_layer/expert_similarity"
SOME = {**MOE, "moe_layer_freq": [0, 1, 0, 1]}


def trained(run: Path, world_size: int, **parallel: Any) -> list[float]:
    made = experiment(
        SOME,
        parallel=layout(**parallel),
        training={"train_iters": 2, "global_batch_size": 4},
        logging={"detail_interval": 2, "expert_similarity": True},
    )
    ranks(world_size).run(on_ranks.train, made, run)
    first, second = records(run)
    assert KEY not in first
    found: list[float] = second[KEY]
    return found


def by_definition(weights: CheckpointWeights, layer: int) -> float:
    """In float64, pair by pair."""
    at = f"decoder.layers.{layer}.mlp.experts"
    flat = [
        np.concatenate(
            [weights.read(f"{at}.{n}.linear_{fc}.weight").double().flatten() for fc in ("fc1", "fc2")]
        )
        for n in range(4)
    ]
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in itertools.combinations(flat, 2)]
    return float(np.mean(cosines))


def test_is_the_mean_cosine_of_all_pairs_in_every_layout(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", 1)
    assert (alone[0], alone[2]) == (None, None)
    weights = CheckpointWeights(checkpoint(tmp_path / "alone", 2))
    expected = [by_definition(weights, 1), by_definition(weights, 3)]
    assert [alone[1], alone[3]] == pytest.approx(expected, abs=1e-7)
    etp = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2}
    for name, parallel in {"EDP": {"tp": 2}, "ETP": {"tp": 2, **etp}, "PP": {"pp": 2}}.items():
        assert trained(tmp_path / name, 2, **parallel)[1::2] == pytest.approx(expected, abs=1e-6)
