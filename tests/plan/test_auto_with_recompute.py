"""Placed layers beside what the user says of recomputation."""

from __future__ import annotations

from typing import Any

import pytest
from plan_experiments import filled

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.auto import placed


def on_two_ranks(**recompute: Any) -> Experiment:
    """Five layers over two stages, placed by the planner."""
    return filled(
        model={"num_layers": 5},
        parallel={"pipeline_model_parallel_size": 2},
        pipeline={"layers_per_stage": "auto"},
        recompute={"layers_per_stage": None, **recompute},
        launch={"cluster": {"preset": "h100"}},
        data={"kind": "mock"},
    )


@pytest.mark.parametrize("method", ["block", "uniform"])
def test_whole_layers_are_all_that_a_rank_holds(method: str) -> None:
    found = placed(on_two_ranks(granularity="full", method=method), None)
    layers = found.pipeline.layers_per_stage
    assert isinstance(layers, list) and sum(layers) == 5
    assert found.recompute.layers_per_stage == (layers if method == "block" else [1, 1])
    assert found.recompute.granularity == "full"


def test_modules_stay() -> None:
    found = placed(on_two_ranks(modules=["layernorm"]), None)
    assert found.recompute.modules == ["layernorm"]
    assert found.recompute.granularity == "selective"
    assert found.recompute.layers_per_stage == [0, 0]
