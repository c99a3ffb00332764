"""`plan --trace`: the simulated iteration in Chrome's trace format."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plan_experiments import filled

from megatron_moe.plan.plan import make
from megatron_moe.plan.show import command
from megatron_moe.plan.trace import Event, chrome_trace

PP2 = filled(
    parallel={"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
    pipeline={"layers_per_stage": [3, 1]},
    recompute={"granularity": "full", "layers_per_stage": [2, 0]},
    training={"train_iters": 10, "global_batch_size": 16, "seq_length": 32},
    launch={"cluster": {"preset": "h100"}},
)
VPP2 = filled(
    parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    pipeline={"layers_per_stage": [1, 1, 1, 1]},
    recompute={"layers_per_stage": [0, 0]},
    launch={"cluster": {"preset": "h100"}},
)


@pytest.fixture(params=[PP2, VPP2, filled()], ids=["pp2", "vpp2", "one rank"])
def traced(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, list[dict[str, Any]]]:
    """An experiment, and the events that `plan --trace` writes of it."""
    command.run(SimpleNamespace(experiment=request.param), None, True, trace=tmp_path / "trace.json")
    assert json.loads(capsys.readouterr().out), "stdout holds the JSON of the plan alone"
    return request.param, json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_no_two_events_of_a_thread_overlap(traced: tuple[Any, list[dict[str, Any]]]) -> None:
    ends: dict[tuple[int, int], float] = defaultdict(float)
    for event in sorted((event for event in traced[1] if event["ph"] == "X"), key=lambda event: event["ts"]):
        thread = event["pid"], event["tid"]
        assert event["dur"] > 0
        assert event["ts"] >= ends[thread] - 1e-6
        ends[thread] = event["ts"] + event["dur"]


def test_computation_is_that_of_the_forecast(traced: tuple[Any, list[dict[str, Any]]]) -> None:
    experiment, events = traced
    plan = make(experiment)
    for rank in plan.forecast.ranks:
        here = [event for event in events if event["ph"] == "X" and event["pid"] == rank.pipeline_rank]
        seconds = {
            category: 1e-6 * sum(event["dur"] for event in here if event["cat"] == category)
            for category in ("forward", "backward", "optimizer")
        }
        assert seconds["forward"] == pytest.approx(plan.num_microbatches * rank.forward_s)
        assert seconds["backward"] == pytest.approx(plan.num_microbatches * rank.backward_s)
        assert seconds["optimizer"] == pytest.approx(plan.forecast.optimizer_s)


def test_waits_are_the_time_that_is_left(traced: tuple[Any, list[dict[str, Any]]]) -> None:
    experiment, events = traced
    forecast = make(experiment).forecast
    for rank in forecast.ranks:
        here = [event for event in events if event["ph"] == "X" and event["pid"] == rank.pipeline_rank]
        now = 0.0
        for event in sorted(here, key=lambda event: event["ts"]):
            assert event["ts"] <= now + 1e-3, "no time is left out"
            if event["cat"] == "wait":
                assert event["ts"] >= now - 1e-3, "a rank that waits does nothing else"
            now = max(now, event["ts"] + event["dur"])
        assert now == pytest.approx(1e6 * forecast.iteration_s)
        waits = 1e-6 * sum(event["dur"] for event in here if event["cat"] == "wait")
        sends = 1e-6 * sum(event["dur"] for event in here if event["cat"] == "communication")
        assert waits <= rank.idle_s + 1e-9 <= waits + sends + 2e-9


def test_every_microbatch_passes_every_stage_twice(traced: tuple[Any, list[dict[str, Any]]]) -> None:
    experiment, events = traced
    plan = make(experiment)
    passes = [event for event in events if event.get("cat") in ("forward", "backward")]
    found = sorted((event["name"], event["args"]["stage"], event["pid"]) for event in passes)
    assert found == sorted(
        (f"{kind}{microbatch}", stage.index, stage.pipeline_rank)
        for kind in "FB"
        for microbatch in range(plan.num_microbatches)
        for stage in plan.stages
    )
    assert all(event["args"]["chunk"] == plan.stages[event["args"]["stage"]].chunk for event in passes)


def test_a_pass_begins_behind_the_send_of_its_input() -> None:
    """And the sends of a rank are as many as its passes have a neighbour."""
    plan, iteration = make(PP2), command.iteration_of(PP2, make(PP2))
    events = command.planned_events(
        iteration.timeline, plan.forecast, iteration.recompute_s, iteration.transfer_s
    )
    sent = {(event.name, event.pipeline_rank): event for event in events if event.category == "communication"}
    assert len(sent) == 2 * plan.num_microbatches
    for event in events:
        if event.name.startswith("F") and event.pipeline_rank == 1:
            before = sent[f"send {event.name}", 0]
            assert event.start_s >= before.start_s + before.duration_s - 1e-12


def test_a_long_iteration_is_traced_with_one_gap() -> None:
    """On each rank an event stands for what is left out, and nothing else runs meanwhile."""
    experiment = filled(
        parallel={"pipeline_model_parallel_size": 2},
        pipeline={"layers_per_stage": [3, 1]},
        recompute={"layers_per_stage": [0, 0]},
        training={"global_batch_size": 1_000_000},
    )
    plan = make(experiment)
    iteration = command.iteration_of(experiment, plan)
    events = command.planned_events(
        iteration.timeline, plan.forecast, iteration.recompute_s, iteration.transfer_s
    )
    gaps = [event for event in events if event.category == "left out"]
    assert [gap.pipeline_rank for gap in gaps] == [0, 1]
    for gap in gaps:
        behind = gap.start_s + gap.duration_s
        here = [event for event in events if event.pipeline_rank == gap.pipeline_rank and event is not gap]
        rounding = 1e-9 * behind
        for event in here:
            is_before = event.start_s + event.duration_s <= gap.start_s + rounding
            # A send may still be under way while what is left out begins.
            assert is_before or event.start_s >= behind - rounding or event.category == "communication"
        forwards = sum(event.category == "forward" for event in here)
        assert forwards + gap.args["microbatches"] == 1_000_000
    waits = sum(event.duration_s for event in events if event.category == "wait")
    assert waits < 0.5 * plan.forecast.pipeline_s


def test_processes_and_threads_have_names_and_places() -> None:
    events = [Event("F0", "forward", rank, "computation", 0.0, 1.0, {"chunk": 0}) for rank in (1, 0)] + [
        Event("send F0", "communication", 0, "communication", 1.0, 0.5)
    ]
    record = chrome_trace(events, origin="measured", details={"iteration": 3})
    about = [
        (event["name"], event["pid"], event["tid"], event["args"])
        for event in record["traceEvents"]
        if event["ph"] == "M"
    ]
    assert ("process_name", 0, 0, {"name": "pipeline rank 0, measured"}) in about
    assert ("thread_name", 0, 1, {"name": "communication"}) in about
    assert ("process_sort_index", 1, 0, {"sort_index": 1}) in about
    assert not any(name == "thread_name" and (rank, lane) == (1, 1) for name, rank, lane, _ in about)
    assert record["otherData"] == {"origin": "measured", "iteration": 3}
