"""Published runs, which nobody here measured: the planner comes near them with one set of figures a GPU."""

from __future__ import annotations

from functools import cache

import pytest
from distributed import REPOSITORY
from validate_planner import RUNS, Row, Run, row

PAGE = (REPOSITORY / "docs" / "planner.md").read_text(encoding="utf-8")
CALIBRATED = [run.name for run in RUNS if not run.is_held_out]
LAYOUTS = ["DP 256 x PP 2", "DP 128 x PP 4", "DP 256 x TP 2", "DP 128 x TP 4"]
"""Of Skywork-13B, the fastest first."""


@cache
def found(name: str) -> Row:
    return row(next(run for run in RUNS if run.name == name))


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_published_speed_is_foretold_within_a_tenth(name: str) -> None:
    assert abs(found(name).off) < 0.10


def test_the_layouts_of_skywork_13b_come_in_the_published_order() -> None:
    rows = [found(f"Skywork-13B: {layout}") for layout in LAYOUTS]
    for speeds in ([one.published for one in rows], [one.planned for one in rows]):
        assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("with_it", "without"),
    [
        ("Mixtral 8x22B, folded", "Mixtral 8x22B, not folded"),
        ("Qwen3-235B, overlap", "Qwen3-235B"),
    ],
)
def test_what_a_feature_gains_is_foretold(with_it: str, without: str) -> None:
    """The gain that is published, within a third of it."""
    fast, slow = found(with_it), found(without)
    published = fast.published / slow.published - 1
    assert fast.planned / slow.planned - 1 == pytest.approx(published, rel=0.35)


@pytest.mark.parametrize(("layout", "mfu"), zip(LAYOUTS, (0.565, 0.551, 0.535, 0.431), strict=True))
def test_skyworks_report_counts_the_square_of_scores(layout: str, mfu: float) -> None:
    """Its tokens a second and its MFU belong together by the count that is held against it."""
    of_run = found(f"Skywork-13B: {layout}")
    assert of_run.published * of_run.mfu / of_run.planned == pytest.approx(mfu, rel=0.01)


def test_nvidia_counts_half_of_it() -> None:
    """245 TFLOP/s and 19.7 s a step belong together where half of the square counts."""
    of_run = found("Qwen3-235B")
    assert of_run.published * of_run.mfu / of_run.planned * 989 == pytest.approx(245, rel=0.01)


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_the_page_shows_what_is_planned(run: Run) -> None:
    """docs/planner.md, whose table is made by the tool. Otherwise: python tools/validate_planner.py"""
    name = run.name.replace(", H800:", ",")
    begins = (f"| {name} |", f"| *held out:* {name} |")
    lines = [line for line in PAGE.splitlines() if line.startswith(begins) and line.count("|") == 8]
    assert len(lines) == 1, lines
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    of_run = found(run.name)
    assert cells[2] == run.published
    assert cells[1].startswith(f"{of_run.plan.layout.world_size:,} ")
    assert float(cells[3].replace(",", "")) == pytest.approx(of_run.published, rel=0.001)
    assert float(cells[4].replace(",", "")) == pytest.approx(of_run.planned, rel=0.01)
    assert float(cells[5].removesuffix(" %")) / 100 == pytest.approx(of_run.off, abs=0.015)
    assert float(cells[6].removesuffix(" %")) / 100 == pytest.approx(of_run.mfu, rel=0.02)
