"""What `megatron-moe plan` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from plan_experiments import filled

from megatron_moe.plan import command, wording
from megatron_moe.plan.costs import FORMULA

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
    recompute={"layers_per_stage": [1, 1, 0, 0]},
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
    assert len(lines) < 70
    assert "1,536 ranks = TP 4 x PP 4 (VPP 2) x CP 2 x DP 48" in text
    assert "126-127" in text, "the last experts are shown"
    stage_rows = [line.split() for line in lines[-12:] if line.split()[:1] and line.split()[0].isdigit()]
    assert [row[3] for row in stage_rows] == ["0-1", "2-3", "4-5", "6-7", "8-9", "10", "11", "12"]
    assert stage_rows[0][-1] == "embedding" and stage_rows[-1][-1] == "loss"


def test_the_formula_stands_beside_the_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert " ".join(FORMULA.split()) in " ".join(printed(capsys, filled()).split())


def test_a_dense_model_on_one_rank_has_no_table_of_experts_or_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, filled(moe=None))
    assert "expert" not in text and "Groups" not in text and "active" not in text
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
        "import sys, megatron_moe.plan.command; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron', 'numpy') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_plan_prints_on_a_terminal_without_unicode() -> None:
    script = (
        "from types import SimpleNamespace; from plan_experiments import filled; "
        "from megatron_moe.plan import command; "
        "experiment = filled(parallel={'tensor_model_parallel_size': 4, 'data_parallel_size': 32}); "
        "command.run(SimpleNamespace(experiment=experiment), None, False)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, stdout=subprocess.DEVNULL)
