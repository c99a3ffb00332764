"""Layers, recompute counts and what else lies on each stage."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_experiments import filled

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.stages import moe_layers, stages_of


def pipeline(
    sizes: list[int], pipeline_size: int, recompute: list[int] | None = None, method: str = "block"
) -> Experiment:
    return filled(
        model={"num_layers": sum(sizes)},
        parallel={
            "pipeline_model_parallel_size": pipeline_size,
            "virtual_pipeline_model_parallel_size": len(sizes) // pipeline_size,
        },
        pipeline={"layers_per_stage": sizes},
        recompute={"layers_per_stage": recompute or [0] * pipeline_size, "method": method},
    )


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_layers_follow_each_other_through_the_stages(
    pipeline_size: int, chunks: int, data: st.DataObject
) -> None:
    number = pipeline_size * chunks
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=number, max_size=number).filter(any))
    stages = stages_of(pipeline(sizes, pipeline_size))
    assert [len(stage.layers) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage.layers] == list(range(sum(sizes)))
    assert len({(stage.pipeline_rank, stage.chunk) for stage in stages}) == number
    for stage, following in pairwise(stages):
        assert following.pipeline_rank == (stage.pipeline_rank + 1) % pipeline_size
        assert following.chunk == stage.chunk + (following.pipeline_rank == 0)
    assert [stage.has_embedding for stage in stages] == [True] + [False] * (number - 1)
    assert [stage.has_loss for stage in stages] == [False] * (number - 1) + [True]


def test_layers_that_do_not_add_up_are_never_planned() -> None:
    experiment = pipeline([3, 3], 2)
    short = experiment.model_copy(update={"model": experiment.model.model_copy(update={"num_layers": 7})})
    with pytest.raises(AssertionError, match="exactly one stage"):
        stages_of(short)


def test_recompute_counts_belong_to_pipeline_ranks_and_hold_in_each_of_their_chunks() -> None:
    stages = stages_of(pipeline([3, 2, 1, 2], 2, recompute=[2, 0]))
    assert [stage.recompute_num_layers for stage in stages] == [2, 0, 2, 0]
    assert [stage.recomputed for stage in stages] == [2, 0, 1, 0]


def test_uniform_recompute_covers_every_layer_in_groups() -> None:
    stages = stages_of(pipeline([4, 4], 2, recompute=[2, 0], method="uniform"))
    assert [(stage.recompute_num_layers, stage.recomputed) for stage in stages] == [(2, 4), (0, 0)]


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [(1, (0, 1, 2, 3, 4)), (2, (0, 2, 4)), (3, (0, 3)), ([0, 1, 1, 0, 1], (1, 2, 4))],
)
def test_moe_layers_follow_the_frequency(frequency: int | list[int], expected: tuple[int, ...]) -> None:
    experiment = filled(
        model={"num_layers": 5}, moe={"moe_layer_freq": frequency}, pipeline={"layers_per_stage": [5]}
    )
    assert moe_layers(experiment) == expected
    assert stages_of(experiment)[0].moe_layers == expected


def test_a_dense_model_has_no_moe_layers() -> None:
    assert stages_of(filled(moe=None))[0].moe_layers == ()
