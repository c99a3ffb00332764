"""`plan --plot`: the picture is there, shows what it should, and says where it cannot be written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import rc_context, rcParamsDefault
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from plan_experiments import filled

from megatron_moe.config.errors import InputError
from megatron_moe.plan.iteration import iteration_of
from megatron_moe.plan.plan import make
from megatron_moe.plan.show import boxes, command, drawing
from megatron_moe.plan.show.picture_style import BLUE, GREEN, ORANGE, RED, STYLE, YELLOW

RECOMPUTED = {
    "parallel": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
    "pipeline": {"layers_per_stage": [3, 1]},
    "recompute": {"granularity": "full", "layers_per_stage": [2, 0]},
    "training": {"train_iters": 10, "global_batch_size": 16, "seq_length": 32},
    "launch": {"cluster": {"preset": "h100", "memory_gib": 0.004, "reserved_gib": 0.001}},
}


def pixels(path: Path, color: str) -> int:
    """How many pixels of a picture have a colour."""
    picture = imread(path)[:, :, :3]
    return int(np.count_nonzero(np.abs(picture - np.array(to_rgb(color))).max(axis=2) < 0.01))


def plotted(path: Path, **sections: object) -> Path:
    command.run(SimpleNamespace(experiment=filled(**sections)), None, True, plot=path)  # type: ignore[arg-type]
    return path


def test_every_kind_of_pass_and_the_limit_are_drawn(tmp_path: Path) -> None:
    path = plotted(tmp_path / "plan.png", **RECOMPUTED)
    for color in (BLUE, ORANGE, YELLOW, GREEN, RED):
        assert pixels(path, color) > 100
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"], "no part of a file stays behind"


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    assert pixels(plotted(tmp_path / "plan.png"), YELLOW) == 0


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_other_forms_follow_the_suffix(tmp_path: Path, suffix: str, begins: bytes) -> None:
    assert plotted(tmp_path / f"plan{suffix}").read_bytes().startswith(begins)


def test_the_same_plan_draws_the_same_file(tmp_path: Path) -> None:
    first, second = (plotted(tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert first == second


def test_a_short_iteration_is_shown_whole_and_a_long_one_in_pieces() -> None:
    def shown(microbatches: int) -> tuple[list[boxes.Window], boxes.Boxes]:
        experiment = filled(**{**RECOMPUTED, "training": {"global_batch_size": 2 * microbatches}})  # type: ignore[arg-type]
        plan = make(experiment)
        iteration = iteration_of(experiment, plan)
        found = boxes.boxes_of(iteration.timeline, iteration.recompute_s, plan.forecast)
        return boxes.windows(found), found

    windows, found = shown(4)
    assert windows[0][0] == 0 and windows[-1][1] == pytest.approx(found.end.max())
    windows, found = shown(400)
    assert len(windows) >= 3
    assert windows[0][0] == 0 and windows[-1][1] == pytest.approx(found.end.max())
    assert all(before[1] < after[0] for before, after in pairwise(windows))
    assert sum(end - start for start, end in windows) < 0.3 * found.end.max()
    windows, found = shown(1_000_000)
    for window in windows:
        assert found.within(window).of("forward").any(), "what is left out is not shown"
    begun = found.within(windows[0])
    assert {0, 1} <= set(begun.microbatch[begun.of("backward")]), "the filling of the pipeline is seen whole"


def test_words_lie_on_the_page_and_apart(tmp_path: Path) -> None:
    experiment = filled(**RECOMPUTED)  # type: ignore[arg-type]
    plan = make(experiment)
    iteration = iteration_of(experiment, plan)
    with rc_context({**rcParamsDefault, **STYLE}):
        name = "a name of some length"
        figure = drawing.figure_of(name, "GPU", plan, iteration.timeline, iteration.recompute_s)
        figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    places = [text.get_window_extent() for text in figure.texts]
    places += [legend.get_window_extent() for legend in figure.legends]
    for place in places:
        assert place.x0 >= 0 and place.y0 >= 0 and place.x1 <= width and place.y1 <= height
    for number, one in enumerate(places):
        for other in places[:number]:
            assert not one.overlaps(other)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plan.jpg", "must end with .png, .svg or .pdf"),
        ("there_is_no/plan.png", "there is no folder"),
        ("folder.png", "is a folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=says) as raised:
        plotted(tmp_path / name)
    assert raised.value.problems[0].startswith("--plot ") and len(raised.value.problems) == 1
