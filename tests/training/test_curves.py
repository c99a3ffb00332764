"""curves.png shows the run's numbers, whatever the run was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_moe.training import curves
from megatron_moe.training.callbacks.curves import Curves


def write(path: Path, count: int, **columns: Any) -> list[dict[str, Any]]:
    """A metrics.jsonl with a function of the iteration for each further column; None is left in as null."""
    records = []
    for n in range(1, count + 1):
        record = {"iteration": n, "loss": 5 / n, "lr": 1e-3, "consumed_tokens": 64 * n}
        record |= {key.replace("__", "/"): column(n) for key, column in columns.items()}
        records.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def titles(figure: Any) -> list[str]:
    return [panel.get_title(loc="left") for panel in figure.axes]


def line(figure: Any, panel: int, number: int = 0) -> tuple[list[float], list[float]]:
    x, y = figure.axes[panel].lines[number].get_data()
    return list(x), list(y)


def test_each_kind_of_model_has_its_panels(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 4)
    assert titles(curves.figure_of(curves.read(path), "a")) == ["Loss", "Learning rate"]
    write(path, 4, moe__drop_rate=lambda n: n / 10)
    figure = curves.figure_of(curves.read(path), "a")
    assert titles(figure) == ["Loss", "Learning rate", "Drop rate"]
    assert line(figure, 2) == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
    # A dropless run drops nothing: what would be dropped is what tells.
    write(path, 4, moe__drop_rate=lambda n: 0, moe__would_drop_rate=lambda n: n / 5)
    figure = curves.figure_of(curves.read(path), "a")
    assert titles(figure)[2] == "Would-drop rate" and line(figure, 2)[1][-1] == 0.8


def test_what_the_router_does_has_panels(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        4,
        moe__drop_rate=lambda n: n / 10,
        eval__drop_rate=lambda n: 0.3 if n % 2 == 0 else None,
        moe__load_max_over_mean=lambda n: 1 + 1 / n,
        moe__router_entropy=lambda n: 2 - n / 10,
    )
    figure = curves.figure_of(curves.read(path), "a")
    assert titles(figure)[2:] == ["Drop rate", "Busiest expert", "Router entropy"]
    assert line(figure, 2, 1) == ([2, 4], [0.3, 0.3])
    assert line(figure, 3)[1] == [2, 1.5, 1 + 1 / 3, 1.25]
    assert line(figure, 4)[1] == [1.9, 1.8, 1.7, 1.6]


def test_the_lines_are_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        6,
        loss=lambda n: None if n == 3 else 5 / n,
        eval__loss=lambda n: 4.0 if n % 2 == 0 else None,
        skipped=lambda n: "no finite gradient" if n == 5 else None,
    )
    figure = curves.figure_of(curves.read(path), "a")
    x, y = line(figure, 0)
    assert x == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(y, [5, 2.5, np.nan, 1.25, 1, 5 / 6])
    assert line(figure, 0, 1) == ([2, 4, 6], [4, 4, 4])
    assert line(figure, 0, 2)[0] == [5]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["training", "held-out", "step skipped"]


def test_long_runs_show_the_mean_before_the_raw_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    noise = np.random.default_rng(1).normal(size=400)
    write(path, 400, loss=lambda n: None if n == 200 else float(noise[n - 1]))
    figure = curves.figure_of(curves.read(path), "a")
    (_, raw), (_, smooth) = line(figure, 0), line(figure, 0, 1)
    assert raw[:9] == list(noise[:9])
    window = 9  # 400 // 50, made odd
    assert f"mean of {window} steps" in figure.axes[0].get_legend().get_texts()[0].get_text()
    for at in (0, 2, 100, 197, 399):
        near = np.array(raw[max(0, at - 4) : at + 5])
        assert smooth[at] == pytest.approx(np.nanmean(near))
    assert np.isnan(smooth[199])


@pytest.mark.parametrize("count", [0, 1, 2, 150])
def test_a_picture_of_any_length_has_a_light_ground(tmp_path, count):
    write(tmp_path / "metrics.jsonl", count, moe__would_drop_rate=lambda n: 0.0)
    curves.draw(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "a run")
    picture = imread(tmp_path / "curves.png")
    height, width, channels = picture.shape
    assert 1000 < width < 2000 and 800 < height < 2000
    assert picture[..., : min(channels, 3)].mean() > 0.9 and picture[0, 0].min() == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_torn_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    path.write_text(path.read_text() + '{"iteration": 4, "lo\n[]\n')
    assert list(curves.read(path)["iteration"]) == [1, 2, 3]


def test_a_picture_that_cannot_be_drawn_is_told_in_a_line(tmp_path, capsys):
    Curves(tmp_path, tmp_path / "log.txt").on_end(SimpleNamespace(experiment=SimpleNamespace(name="a")))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("logging.curves: curves.png could not be drawn (FileNotFoundError")


@pytest.mark.slow
def test_matplotlib_says_nothing_where_it_cannot_keep_its_files(tmp_path):
    write(tmp_path / "metrics.jsonl", 3)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from megatron_moe.training.callbacks.curves import Curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "run = Path(sys.argv[1])\n"
        "Curves(run, run / 'log.txt').on_end(SimpleNamespace(experiment=SimpleNamespace(name='a')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "HOME": "/proc/none", "TMPDIR": str(tmp_path), "MPLCONFIGDIR": "/proc/none"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
