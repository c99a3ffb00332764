"""Times, waiting and memory of pipeline ranks, and the timeline of a step."""

from __future__ import annotations

import itertools
import json

import pytest
import train_on_ranks as on_ranks
from distributed import ranks
from experiments import experiment, layout

from megatron_moe.plan import plan
from megatron_moe.plan.costs import parameters as costs

GIB = 2**30
STAGE = ("stage/forward_ms", "stage/backward_ms", "stage/idle_ms", "stage/peak_memory_gib")


def records(made, run, world_size=2, count=2):
    """The same on every rank, but for rank 0's step times."""
    of_ranks = ranks(world_size).run(on_ranks.steps, made, run, count)
    told = [[[str(step.get(key)) for key in STAGE] for step in steps] for steps in of_ranks]
    assert told == [told[0]] * world_size
    return of_ranks[0]


@pytest.mark.second_pair
def test_each_pipeline_rank_has_an_entry_every_detail_interval(tmp_path):
    made = experiment(parallel=layout(pp=2), logging={"detail_interval": 2})
    first, second = records(made, tmp_path)
    assert not any(key in first for key in STAGE)
    forward, backward, idle, memory = (second[key] for key in STAGE)
    assert len(forward) == len(backward) == len(idle) == len(memory) == 2
    assert min(*forward, *backward, *idle, *memory) > 0
    microbatches = 4
    lengths = [microbatches * (f + b) + wait for f, b, wait in zip(forward, backward, idle, strict=True)]
    assert lengths[0] == pytest.approx(lengths[1])
    assert lengths[0] < 1000 * second["step_time_s"]


def test_memory_is_state_and_what_microbatches_in_flight_keep(tmp_path):
    peaks = {}
    for recomputed in (0, 2):
        made = experiment(
            parallel=layout(pp=2),
            recompute={"layers_per_stage": [recomputed] * 2},
            logging={"detail_interval": 1},
        )
        first, second = records(made, tmp_path)
        peaks[recomputed] = first["stage/peak_memory_gib"]
        # Traced in the first step, with the optimizer's state that only later steps begin with.
        assert second["stage/peak_memory_gib"] == peaks[recomputed]
        for stage, peak in zip(plan.make(made).stages, peaks[recomputed], strict=True):
            parameters = costs.stage_costs(made, plan.make(made).layout, stage).parameters_per_rank
            # Weight, gradient and two moments in fp32, and something for activations.
            assert 16 * parameters / GIB < peak < 16 * parameters / GIB + 0.003
    assert all(less < more for less, more in zip(peaks[2], peaks[0], strict=True))


def test_merged_passes_are_not_told_apart(tmp_path):
    made = experiment(
        moe={"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "overlap_moe_expert_parallel_comm": True},
        parallel=layout(dp=2, expert_model_parallel_size=2),
        training={"precision": "bf16"},
        logging={"detail_interval": 1},
    )
    record = records(made, tmp_path, count=1)[0]
    assert [str(record[key]) for key in STAGE[:3]] == ["[nan]"] * 3
    assert record["stage/peak_memory_gib"][0] > 0


def timeline(made, run):
    """(pipeline rank, thread) -> its events, by begin."""
    ranks(2).run(on_ranks.steps, made, run, 2)
    trace = json.loads((run / "timeline.json").read_text())
    assert trace["otherData"] == {"origin": "measured", "iteration": 2}
    lanes: dict[tuple[int, int], list] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            lanes.setdefault((event["pid"], event["tid"]), []).append(event)
    return lanes


def order(events):
    return [
        f"{event['name']}/{event['args']['chunk']}"
        for event in events
        if event["cat"] in ("forward", "backward")
    ]


@pytest.mark.second_pair
def test_timeline_shows_the_schedule_on_one_clock(tmp_path):
    made = experiment(parallel=layout(pp=2), logging={"timeline_iter": 2})
    lanes = timeline(made, tmp_path)
    assert order(lanes[0, 0]) == [f"{name}/0" for name in ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]]
    assert order(lanes[1, 0]) == [f"{name}/0" for name in ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"]]
    assert [lane[-1]["cat"] for lane in (lanes[0, 0], lanes[1, 0])] == ["optimizer"] * 2
    found = {
        (rank, event["name"]): (event["ts"], event["ts"] + event["dur"])
        for (rank, _), lane in lanes.items()
        for event in lane
    }
    for microbatch in range(4):
        assert found[0, f"F{microbatch}"][1] <= found[1, f"F{microbatch}"][0]
        assert found[1, f"B{microbatch}"][1] <= found[0, f"B{microbatch}"][0]
    for lane in lanes.values():
        for before, after in itertools.pairwise(lane):
            assert before["ts"] + before["dur"] <= after["ts"]
    assert {event["cat"] for event in lanes[1, 1]} == {"wait", "communication", "gradients"}


def test_timeline_of_model_chunks(tmp_path):
    made = experiment(parallel=layout(pp=2, vpp=2, dp=1), logging={"timeline_iter": 2})
    lanes = timeline(made, tmp_path)
    # Interleaved 1F1B, from figure 4 of Narayanan et al. 2021: groups of two microbatches, chunk by chunk.
    forward = ["F0/0", "F1/0", "F0/1", "F1/1", "F2/0", "F3/0", "F2/1", "F3/1"]
    backward = ["B0/1", "B1/1", "B0/0", "B1/0", "B2/1", "B3/1", "B2/0", "B3/0"]
    for rank, warm_up in ((0, 4), (1, 2)):
        passes = order(lanes[rank, 0])
        assert [name for name in passes if name[0] == "F"] == forward
        assert [name for name in passes if name[0] == "B"] == backward
        assert passes.index("B0/1") == warm_up + 1


def test_timeline_shows_waiting_for_experts_and_leaves_other_steps_alone(tmp_path):
    made = experiment(parallel=layout(tp=2), logging={"timeline_iter": 2, "detail_interval": 4})
    lanes = timeline(made, tmp_path)
    assert "wait for experts' tokens" in {event["name"] for event in lanes[0, 1]}
    assert set(lanes) == {(0, 0), (0, 1)}
    plain = experiment(parallel=layout(tp=2), logging={"detail_interval": 4})
    (first, second), _ = ranks(2).run(on_ranks.steps, plain, tmp_path / "plain", 2)
    assert not any(key.startswith("stage/") or "communication" in key for key in (*first, *second))
