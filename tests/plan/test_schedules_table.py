"""`plan --schedules`: other schedules of the same work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from plan_experiments import filled

from megatron_moe.plan.iteration import iteration_of
from megatron_moe.plan.plan import make
from megatron_moe.plan.show import command
from megatron_moe.plan.show.schedules_table import compared

LAYOUTS = {
    "1F1B": filled(
        parallel={"pipeline_model_parallel_size": 4},
        pipeline={"layers_per_stage": [1, 1, 1, 1]},
        recompute={"layers_per_stage": [0, 0, 0, 0]},
        launch={"cluster": {"preset": "h100"}},
    ),
    "interleaved 1F1B, VPP 2": filled(
        parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        pipeline={"layers_per_stage": [1, 1, 1, 1]},
        recompute={"layers_per_stage": [0, 0]},
        launch={"cluster": {"preset": "h100"}},
    ),
}


@pytest.mark.parametrize("planned", LAYOUTS)
def test_all_schedules_do_the_same_work_and_the_planned_one_is_the_forecast(planned: str) -> None:
    plan = make(LAYOUTS[planned])
    found = dict(compared(plan, iteration_of(LAYOUTS[planned], plan)))
    assert len(found) == 4
    busy = {name: len(one.idle_s) * one.makespan_s - sum(one.idle_s) for name, one in found.items()}
    assert list(busy.values()) == pytest.approx([busy[planned]] * 4)
    assert found[planned].makespan_s == pytest.approx(plan.forecast.pipeline_s)
    kept = {name: max(one.peak_kept_bytes) for name, one in found.items()}
    assert kept["GPipe"] == max(kept.values())


def test_the_table_marks_the_planned_one(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(SimpleNamespace(experiment=LAYOUTS["1F1B"]), None, False, schedules=True)
    marked = [line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("planned")]
    assert len(marked) == 1 and marked[0].startswith("1F1B ")


def test_interleaving_needs_microbatches_that_pp_divides(capsys: pytest.CaptureFixture[str]) -> None:
    odd = filled(
        parallel={"pipeline_model_parallel_size": 4},
        pipeline={"layers_per_stage": [1, 1, 1, 1]},
        recompute={"layers_per_stage": [0, 0, 0, 0]},
        training={"global_batch_size": 6},
        launch={"cluster": {"preset": "h100"}},
    )
    command.run(SimpleNamespace(experiment=odd), None, False, schedules=True)
    text = capsys.readouterr().out
    assert "interleaved 1F1B," not in text and "multiples of PP = 4" in text
