"""`plan --against`: forecasts beside what runs measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from experiments import experiment, layout

from megatron_moe.config.errors import InputError
from megatron_moe.plan import against, plan


def record(iteration, forward, backward, speed=1000.0, memory=None, idle=(10.0, 5.0)):
    return {
        "iteration": iteration,
        "tokens_per_second": speed,
        "stage/forward_ms": forward,
        "stage/backward_ms": backward,
        "stage/idle_ms": list(idle),
        "stage/peak_memory_gib": memory or [None, None],
    }


def run_folder(folder, made, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan.make(made).to_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.fixture
def made(tmp_path):
    return experiment(parallel=layout(pp=2), logging={"root": str(tmp_path / "none")})


def test_medians_of_measured_steps_stand_beside_the_forecast(made, tmp_path, capsys):
    forecast = plan.make(made).forecast
    forward = [1000 * rank.forward_s for rank in forecast.ranks]
    backward = [1000 * rank.backward_s for rank in forecast.ranks]
    right = [record(n, forward, backward, memory=[1.0, 1.0]) for n in (2, 4, 6)]
    # The first step, one that the machine was late in, and one without details.
    others = [record(1, [999.0] * 2, [999.0] * 2), record(8, [9.0] * 2, backward)]
    others += [{"iteration": 3, "tokens_per_second": 1000.0}]
    folder = run_folder(tmp_path / "run", made, [*right, *others])
    found = against.compare(plan.make(made), against._records(folder, made))
    assert [pair.difference for pair in found.forward_ms] == pytest.approx([0, 0])
    assert [pair.measured for pair in found.idle_ms] == [10.0, 5.0]
    assert [pair.measured for pair in found.memory_gib] == [1.0, 1.0]
    assert found.speed.measured == 1000.0
    against.run(SimpleNamespace(experiment=made), folder)
    printed = " ".join(capsys.readouterr().out.split())
    assert "+0.0 %" in printed and "1,000 measured" in printed
    assert "medians: of 4 steps" in printed and "of 5 for the speed" in printed


def test_the_sentence_names_what_costs_most(made):
    planned = plan.make(made)
    forward = [1000 * rank.forward_s for rank in planned.forecast.ranks]
    backward = [1000 * rank.backward_s for rank in planned.forecast.ranks]
    memory = [(rank.memory.total - rank.memory.reserved) / 2**30 for rank in planned.forecast.ranks]
    near = against.compare(planned, [record(2, forward, backward, memory=memory)])
    assert "within 5 %" in against.verdict(near)
    late = [backward[0], 2 * backward[1]]
    sentence = against.verdict(against.compare(planned, [record(2, forward, late, memory=memory)]))
    assert "the backward pass of pipeline rank 1" in sentence and "(-50.0 %)" in sentence
    assert "memory" not in sentence
    full = [memory[0] / 2, memory[1]]
    sentence = against.verdict(against.compare(planned, [record(2, forward, late, memory=full)]))
    assert "the backward pass of pipeline rank 1" in sentence
    assert "memory of pipeline rank 0" in sentence and "(+100.0 %)" in sentence


def test_what_a_run_did_not_measure_is_left_open(made, tmp_path, capsys):
    folder = run_folder(tmp_path / "run", made, [record(2, [None] * 2, [None] * 2)])
    against.run(SimpleNamespace(experiment=made), folder)
    assert "The run measured no passes." in capsys.readouterr().out


def test_folders_that_cannot_be_compared(made, tmp_path):
    def refused(folder, of=made):
        with pytest.raises(InputError) as error:
            against.run(SimpleNamespace(experiment=of), folder)
        (line,) = error.value.problems
        return line

    assert "no such folder" in refused(tmp_path / "missing")
    assert "no run's folder" in refused(tmp_path)
    steps = [{"iteration": 2, "tokens_per_second": 1.0}]
    assert "logging.detail_interval" in refused(run_folder(tmp_path / "plain", made, steps))
    folder = run_folder(tmp_path / "run", made, [record(2, [1.0] * 2, [1.0] * 2)])
    (folder / "metrics.jsonl").write_text('{"iteration": 2')
    assert "torn line" in refused(folder)
    (folder / "metrics.jsonl").unlink()
    assert "no metrics.jsonl" in refused(folder)
    (folder / "plan.json").write_text("{}")
    assert "torn or of another version" in refused(folder)


def test_another_layout_or_split_is_refused_by_name(made, tmp_path):
    folder = run_folder(tmp_path / "run", made, [record(2, [1.0] * 2, [1.0] * 2)])
    for more, words in (
        ({"parallel": layout(pp=1)}, "PP 2 (here 1)"),
        ({"parallel": layout(pp=2), "pipeline": {"layers_per_stage": [3, 1]}}, "[2, 2] (here [3, 1])"),
        ({"parallel": layout(pp=2), "model": {"hidden_size": 64}}, "parameters "),
        ({"parallel": layout(pp=2), "training": {"seq_length": 64}}, "FLOPs a token "),
    ):
        with pytest.raises(InputError) as error:
            against.run(SimpleNamespace(experiment=experiment(**more)), folder)
        assert words in str(error.value) and "resolved.yaml" in str(error.value)
