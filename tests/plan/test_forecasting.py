"""The forecast of a plan adds up, and says what limits the run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from plan_experiments import filled

from megatron_moe.plan.forecast import Forecast
from megatron_moe.plan.limits import limits_of
from megatron_moe.plan.plan import Plan, make

BATCH = {"global_batch_size": 64, "micro_batch_size": 2}
STAGES = {
    "parallel": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
    "pipeline": {"layers_per_stage": [3, 1]},
    "recompute": {"granularity": "full", "layers_per_stage": [2, 1]},
    "training": BATCH | {"train_iters": 1000, "seq_length": 32},
    "launch": {"cluster": {"preset": "h100"}},
}


def planned(**sections: object) -> tuple[Plan, Forecast]:
    plan = make(filled(**{**STAGES, **sections}))  # type: ignore[arg-type]
    return plan, plan.forecast


def test_the_parts_of_an_iteration_add_up() -> None:
    plan, forecast = planned()
    assert plan.num_microbatches == 16
    whole = forecast.pipeline_s + forecast.gradient_s + forecast.optimizer_s
    assert forecast.iteration_s == pytest.approx(whole)
    for rank in forecast.ranks:
        busy = plan.num_microbatches * (rank.forward_s + rank.backward_s)
        assert rank.idle_s + busy == pytest.approx(forecast.pipeline_s)
    assert forecast.bubble == pytest.approx(sum(r.idle_s for r in forecast.ranks) / 2 / forecast.pipeline_s)


def test_speed_follows_from_the_time_of_an_iteration() -> None:
    plan, forecast = planned()
    tokens = 64 * 32 / forecast.iteration_s / plan.layout.world_size
    assert forecast.tokens_per_second_per_gpu == pytest.approx(tokens)
    assert forecast.tflops_per_gpu == pytest.approx(tokens * plan.flops_per_token / 1e12)
    assert forecast.mfu == pytest.approx(tokens * plan.flops_per_token / 989e12)
    assert forecast.days == pytest.approx(1000 * forecast.iteration_s / 86400)


def test_a_run_whose_batch_grows_takes_the_time_of_its_batches() -> None:
    growing = BATCH | {"train_iters": 1000, "seq_length": 32, "rampup_batch_size": [16, 16, 4800]}
    experiment = filled(**{**STAGES, "training": growing})  # type: ignore[arg-type]
    days = 0.0
    for steps, size in ((100, 16), (50, 32), (34, 48), (1000 - 184, 64)):
        of_size = planned(
            training=BATCH | {"train_iters": steps, "seq_length": 32, "global_batch_size": size}
        )
        days += of_size[1].days
    assert make(experiment).forecast.days == pytest.approx(days, rel=1e-3)


def test_one_stage_has_no_bubble() -> None:
    _, forecast = planned(
        parallel={"data_parallel_size": 1},
        pipeline={"layers_per_stage": [4]},
        recompute={"layers_per_stage": [0]},
    )
    assert forecast.bubble == 0 and forecast.transfer_s == 0
    assert [rank.in_flight for rank in forecast.ranks] == [1]


def test_the_first_stage_keeps_more_microbatches_than_the_last() -> None:
    _, forecast = planned()
    assert [rank.in_flight for rank in forecast.ranks] == [2, 1]


def test_recomputation_takes_time_and_saves_activations() -> None:
    _, with_it = planned()
    _, without = planned(recompute={"layers_per_stage": [0, 0]})
    for more, less in zip(with_it.ranks, without.ranks, strict=True):
        assert more.backward_s > less.backward_s and more.forward_s == less.forward_s
        assert more.memory.activations < less.memory.activations


def test_what_does_not_fit_is_said_first() -> None:
    tight = {"preset": "h100", "memory_gib": 0.01, "reserved_gib": 0.0}
    _, forecast = planned(
        launch={"cluster": tight}, model={"num_layers": 4, "hidden_size": 1024, "kv_channels": 256}
    )
    assert forecast.limits[0].startswith("It does not fit: pipeline rank 0 needs ")
    worst = max(-(rank.memory.headroom or math.nan) for rank in forecast.ranks)
    assert f"needs {worst / 2**20:,.0f} MiB more" in forecast.limits[0]


@pytest.mark.parametrize(
    ("microbatches", "slowest", "filling", "says"),
    [
        # 10 x (1.06 - 1.03) uneven and 0.4 at the ends, of 11 in all: each is small, together they are not.
        (
            10,
            1.06,
            0.4,
            "idle for 6.4 % of an iteration: for 3.6 % while the pipeline fills and drains, for 2.7 %",
        ),
        (10, 1.0, 0.2, "Nothing but computation"),
        (1, 1.0, 0.2, "an iteration with 1 microbatch:"),
    ],
)
def test_idle_time_is_not_called_computation(
    microbatches: int, slowest: float, filling: float, says: str
) -> None:
    _, forecast = planned()
    times = (1.0, slowest)
    pipeline = microbatches * slowest + filling
    ranks = [
        replace(rank, forward_s=time / 4, backward_s=3 * time / 4, idle_s=pipeline - microbatches * time)
        for rank, time in zip(forecast.ranks, times, strict=True)
    ]
    made = replace(
        forecast,
        ranks=tuple(ranks),
        pipeline_s=pipeline,
        bubble=sum(rank.idle_s for rank in ranks) / 2 / pipeline,
        iteration_s=pipeline,
        **dict.fromkeys(("exposed_all_to_all_s", "gradient_s", "optimizer_s"), 0.0),
    )
    (sentence,) = limits_of(made, microbatches)
    assert says in sentence


def test_the_forecast_survives_the_file_of_the_plan() -> None:
    plan, _ = planned()
    assert Plan.from_json(plan.to_json()) == plan


def test_layers_too_small_for_a_gpu_are_said_to_wait_for_the_host() -> None:
    """Width 64 on an H100: the host is what limits it; width 8,192 on long sequences: it is not."""
    _, small = planned()
    assert "as long as the host takes to launch their kernels" in small.limits[0]
    large = {
        "hidden_size": 8192,
        "kv_channels": 2048,
        "ffn_hidden_size": 16384,
        "max_position_embeddings": 8192,
    }
    _, forecast = planned(
        model=large,
        moe={"num_moe_experts": 8, "moe_ffn_hidden_size": 8192},
        training=BATCH | {"seq_length": 8192},
    )
    assert not any("the host" in sentence for sentence in forecast.limits)
