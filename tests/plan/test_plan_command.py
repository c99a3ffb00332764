"""What `megatron-moe plan` prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from plan_experiments import filled

from megatron_moe.config.loading import load
from megatron_moe.config.schema import Experiment
from megatron_moe.plan import wording
from megatron_moe.plan.costs.parameters import FORMULA
from megatron_moe.plan.plan import make
from megatron_moe.plan.show import command

ROOT = Path(__file__).parents[2]
LARGE = filled(
    parallel={
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "data_parallel_size": 48,
        "expert_model_parallel_size": 64,
    },
    moe={"num_moe_experts": 128},
    model={"num_layers": 13},
    pipeline={"layers_per_stage": [2, 2, 2, 2, 2, 1, 1, 1]},
    recompute={"granularity": "full", "layers_per_stage": [1, 1, 0, 0]},
    training={"train_iters": 10, "global_batch_size": 48 * 8, "seq_length": 32},
    launch={"cluster": {"preset": "h100"}},
)
UNEVEN = filled(
    parallel={"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
    pipeline={"layers_per_stage": [3, 1]},
    recompute={"granularity": "full", "layers_per_stage": [2, 0]},
    training={"train_iters": 1000, "global_batch_size": 64, "seq_length": 32},
    launch={"cluster": {"preset": "h100", "memory_gib": 0.004, "reserved_gib": 0.001}},
)


def printed(capsys: pytest.CaptureFixture[str], experiment: object, **options: object) -> str:
    command.run(SimpleNamespace(experiment=experiment), **{"gpus": None, "as_json": False, **options})
    return capsys.readouterr().out


def test_json_leaves_nothing_else_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(printed(capsys, filled(), as_json=True))
    assert set(record["parameters"]) == {"total", "active"}


def test_a_large_plan_fits_a_terminal_and_cuts_nothing_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, LARGE)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 80
    assert "1,536 ranks = TP 4 x PP 4 (VPP 2) x CP 2 x DP 48" in text
    assert "126-127" in text, "the last experts are shown"
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    first = rows_under(text, "13 layers on 8 stages")
    assert [row[0] for row in first] == ["0", "1", "2", "3"]
    assert " ".join(first[0][1:6]) == "embedding, 0-1 | 8-9 4"
    assert " ".join(first[3][1:6]) == "6-7 | 12, loss 3"
    assert [row[1] for row in rows_under(text, "Memory of each rank")] == [
        str(rank.in_flight) for rank in make(LARGE).forecast.ranks
    ]


def test_an_iteration_too_long_to_simulate_is_said_to_be_extended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ten million microbatches take as long as 10,000 times a thousand, but for filling the pipeline once."""
    text = printed(capsys, of_microbatches(10_000_000), schedules=True)
    assert "Of 10,000,000 microbatches the first and the last ones are simulated" in text
    assert "are simulated" not in printed(capsys, of_microbatches(1000))
    long, short = (make(of_microbatches(count)).forecast for count in (10_000_000, 1000))
    assert long.pipeline_s == pytest.approx(10_000 * short.pipeline_s, rel=5e-3)
    assert long.pipeline_s < 10_000 * short.pipeline_s
    assert [rank.in_flight for rank in long.ranks] == [rank.in_flight for rank in short.ranks]


def of_microbatches(count: int) -> Experiment:
    return filled(
        parallel={"pipeline_model_parallel_size": 2},
        pipeline={"layers_per_stage": "auto"},
        recompute={"layers_per_stage": [0, 0]},
        training={"global_batch_size": count},
        data={"kind": "mock"},
    )


@pytest.mark.parametrize("recipe", ["quickstart", "mixtral_8x7b", "deepseek_v3"])
def test_recipes_fit_a_terminal(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command.run(load(ROOT / "configs" / f"{recipe}.yaml", []), None, False)
    text = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= 80


def rows_under(text: str, title: str) -> list[list[str]]:
    """The cells of the table below a title."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(title))
    rule = next(
        number
        for number in range(first, len(lines))
        if lines[number].startswith("\N{BOX DRAWINGS LIGHT HORIZONTAL}")
    )
    end = next(number for number in range(rule, len(lines)) if not lines[number].strip())
    return [line.split() for line in lines[rule + 1 : end]]


def test_the_tables_hold_the_numbers_of_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, UNEVEN)
    forecast = make(UNEVEN).forecast
    for rank, row in zip(forecast.ranks, rows_under(text, "4 layers on 2 stages"), strict=True):
        assert float(row[-1]) == pytest.approx(100 * rank.idle_s / forecast.pipeline_s, abs=0.06)
    for rank, row in zip(forecast.ranks, rows_under(text, "Memory of each rank"), strict=True):
        parts = [float(cell) for cell in row[2:8]]
        assert sum(parts) == pytest.approx(float(row[8]), rel=0.05)
        assert float(row[8]) * 2**20 == pytest.approx(rank.memory.total, rel=0.05)
    unit, seconds = wording.in_one_unit([forecast.iteration_s], wording.SECONDS, digits=4)
    whole = re.search(r"^iteration +([\d.]+) +100.0 %", text, re.MULTILINE)
    assert whole and whole[1] == seconds(forecast.iteration_s)
    assert re.search(rf"^an iteration +{unit} +share", text, re.MULTILINE)
    words = " ".join(text.split())
    assert f"MFU {100 * (forecast.mfu or 0):.1f} %" in words
    assert "Budget 2.048 M tokens = 1,000 iterations x 64 x 32" in words
    for sentence in forecast.limits:
        assert sentence in words


def test_what_does_not_fit_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_under(text := printed(capsys, UNEVEN), "Memory of each rank")
    over = [rank.memory.total > 0.004 * 2**30 for rank in make(UNEVEN).forecast.ranks]
    assert any(over) and [row[-1] == "!" for row in rows] == over
    assert "does not fit: pipeline rank" in text


@pytest.mark.parametrize("given", [{"layers_per_stage": [0, 0]}, {"modules": ["moe_act"]}])
def test_what_would_help_is_said_and_helps(
    capsys: pytest.CaptureFixture[str], given: dict[str, object]
) -> None:
    sections = {
        "data": {"kind": "mock"},
        "model": {"hidden_size": 256, "kv_channels": 64},
        "parallel": {"pipeline_model_parallel_size": 2},
        "pipeline": {"layers_per_stage": [2, 2]},
        "training": {"global_batch_size": 64, "micro_batch_size": 16, "seq_length": 32},
        "launch": {"cluster": {"preset": "h100", "memory_gib": 0.027, "reserved_gib": 0.0}},
    }
    selective = {"granularity": "selective", "layers_per_stage": [0, 0]} if "modules" in given else {}
    text = printed(capsys, filled(**sections, recompute={**given, **selective}))
    said = re.search(r"Does not fit. recompute.layers_per_stage='\[(.*?)\]'", " ".join(text.split()))
    assert said, text
    counts = [int(count) for count in said[1].split(",")]
    helped = make(filled(**sections, recompute={"granularity": "full", "layers_per_stage": counts}))
    assert all((rank.memory.headroom or -1) >= 0 for rank in helped.forecast.ranks)


def test_memory_that_is_not_known_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = make(filled())
    ranks = tuple(replace(rank, memory=replace(rank.memory, limit=None)) for rank in known.forecast.ranks)
    plan = replace(known, forecast=replace(known.forecast, ranks=ranks, mfu=None))
    monkeypatch.setattr(command, "make", lambda experiment: plan)
    text = printed(capsys, filled())
    assert "launch.cluster.memory_gib" in text and "launch.cluster.peak_tflops" in text
    assert "free" not in text


def test_json_holds_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(printed(capsys, UNEVEN, as_json=True))
    assert len(record["forecast"]["ranks"]) == 2
    assert record["forecast"]["iteration_s"] > 0


def test_the_formula_stands_beside_the_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert " ".join(FORMULA.split()) in " ".join(printed(capsys, filled()).split())


def test_a_dense_model_on_one_rank_has_no_table_of_experts_or_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, filled(moe=None))
    assert "expert" not in text and "groups" not in text and "active" not in text
    assert "idle" not in text and "all-to-all" not in text and "in\nflight" not in text
    assert "1 rank = " in text


def test_axes_over_the_same_ranks_share_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    edp = filled(parallel={"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2})
    assert "TP, EP" in printed(capsys, edp, gpus=2)


def test_experts_of_a_layer_lie_on_the_ranks_of_its_stage_only(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "data_parallel_size": 2,
    }
    stages, recompute = {"layers_per_stage": [2, 2]}, {"layers_per_stage": [0, 0]}
    text = printed(capsys, filled(parallel=sizes, pipeline=stages, recompute=recompute))
    assert "of an MoE layer of pipeline rank 0" in text
    assert ["0-3", "2", "ranks", "0,", "2"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([5], "5"),
        ([0, 1, 2, 3], "0-3"),
        ([0, 1, 4, 5], "0-1, 4-5"),
        (list(range(0, 40, 4)), "0, 4 ... 36"),
    ],
)
def test_lists_of_numbers_are_short(numbers: list[int], text: str) -> None:
    assert wording.number_list(numbers) == text


def test_group_lists_show_what_fits_and_the_last() -> None:
    groups = [[2 * i, 2 * i + 1] for i in range(100)]
    assert wording.group_list(groups[:2], 20) == "0-1 | 2-3"
    assert wording.group_list(groups, 32) == "0-1 | 2-3 | 4-5 | ... | 198-199"


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512"), (999, "999"), (1000, "1.000 K"), (999_999, "1.000 M"), (146_360_000_000, "146.4 B")],
)
def test_counts_carry_a_unit(value: int, text: str) -> None:
    assert wording.count(value) == text


def test_planning_imports_no_torch() -> None:
    script = (
        "import sys, megatron_moe.plan.show.command; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron', 'numpy') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_plan_prints_on_a_terminal_without_unicode() -> None:
    script = (
        "from types import SimpleNamespace; from plan_experiments import filled; "
        "from megatron_moe.plan.show import command; "
        "experiment = filled(parallel={'tensor_model_parallel_size': 4, 'data_parallel_size': 8}); "
        "command.run(SimpleNamespace(experiment=experiment), None, False)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, stdout=subprocess.DEVNULL)
