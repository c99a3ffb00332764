"""Draw the losses of several runs beside each other, against steps and against compute, and print them.

    python tools/compare_runs.py PICTURE.png "a label=runs/one" "another=runs/two"

Lines with dots are held-out losses, pale ones those of training. Where a run logs how alike its experts are
(`logging.expert_similarity`), that is drawn below. Compute is what `plan` counts for a token.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.plan.costs.parameters import Parameters, count_parameters, flops_per_token
from megatron_moe.plan.show.picture_style import BLUE, GREEN, GREY, PINK, STYLE, VERMILION
from megatron_moe.training.expert_similarity import KEY as SIMILARITY

COLOURS = (BLUE, VERMILION, GREEN, PINK)


@dataclass
class Run:
    """What is drawn of a run.

    Attributes:
        loss, held_out: [n, 2], step and loss in nats a token.
        similarity: [n, 4], step, and of the layers with experts mean, lowest and highest.
        flops_per_step: FLOP of one step, forward and backward.
    """

    label: str
    parameters: Parameters
    tokens: int
    flops_per_step: float
    loss: np.ndarray
    held_out: np.ndarray
    similarity: np.ndarray


def main(arguments: list[str] | None = None) -> int:
    """Draw, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="what to call a run, and its folder")
    parser.add_argument("--title", default="", help="above the picture")
    args = parser.parse_args(arguments)
    if len(args.runs) > len(COLOURS):
        parser.error(f"{len(args.runs)} runs, but there are colours for {len(COLOURS)}")
    try:
        runs = [read(*_label_and_folder(run)) for run in args.runs]
    except InputError as error:
        parser.error("; ".join(error.problems))
    draw(runs, args.picture, args.title)
    print(table(runs))
    return 0


def read(label: str, folder: Path) -> Run:
    """Raises InputError where the folder is no run, or one without a step."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{folder}: no run ({error.strerror}: metrics.jsonl)") from None
    steps = [json.loads(line) for line in lines]
    if not steps:
        raise InputError(f"{folder}: no step was made yet")
    experiment = load(folder / "resolved.yaml").experiment
    tokens = steps[-1]["consumed_tokens"]
    return Run(
        label=label,
        parameters=count_parameters(experiment),
        tokens=tokens,
        flops_per_step=flops_per_token(experiment) * tokens / steps[-1]["iteration"],
        loss=_column(steps, "loss"),
        held_out=_column(steps, "eval/loss"),
        similarity=_similarity(steps),
    )


def draw(runs: list[Run], picture: Path, title: str) -> None:
    """Write the PNG."""
    rows = 2 if any(len(run.similarity) for run in runs) else 1
    with rc_context({**rcParamsDefault, **STYLE}):
        layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1)
        figure = Figure(figsize=(10.0, 1.0 + 3.2 * rows), dpi=160, facecolor="white", layout=layout)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        grid = figure.add_gridspec(rows, 2, height_ratios=[3.2, 2.0][:rows])
        by_step, by_compute = (figure.add_subplot(grid[0, column]) for column in range(2))
        for run, colour in zip(runs, COLOURS, strict=False):
            _losses(by_step, run, colour, 1.0)
            _losses(by_compute, run, colour, run.flops_per_step / 1e12)
        _label(by_step, "Loss against steps", "nats a token", "step")
        _label(by_compute, "Loss against compute", "nats a token", "TFLOP, forward and backward")
        by_step.legend(loc="upper right")
        if rows == 2:
            _similarities(figure.add_subplot(grid[1, :]), runs)
        FigureCanvasAgg(figure).print_png(str(picture))


def table(runs: list[Run]) -> str:
    """A Markdown table: what each run is and where it ended."""
    lines = [
        "| run | parameters, M (active) | steps, tokens | TFLOP | loss, first step | held-out at the end "
        "(best) | 1 - similarity of experts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        held_out, alike = run.held_out[:, 1], run.similarity[:, 1]
        steps = run.loss[-1, 0]
        cells = [
            run.label,
            f"{run.parameters.total / 1e6:,.1f} ({run.parameters.active / 1e6:,.1f})",
            f"{steps:,.0f}, {run.tokens:,}",
            f"{run.flops_per_step * steps / 1e12:,.1f}",
            f"{run.loss[0, 1]:.3f}",
            f"{held_out[-1]:.3f} ({held_out.min():.3f})" if len(held_out) else "",
            f"{1 - alike[0]:.1e} to {1 - alike[-1]:.1e}" if len(alike) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _label_and_folder(text: str) -> tuple[str, Path]:
    label, found, folder = text.rpartition("=")
    if not found:
        raise InputError(f"{text}: say LABEL=FOLDER")
    return label, Path(folder)


def _column(steps: list[dict[str, float | None]], key: str) -> np.ndarray:
    pairs = [(step["iteration"], step[key]) for step in steps if step.get(key) is not None]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def _similarity(steps: list[dict[str, list[float | None]]]) -> np.ndarray:
    rows = []
    for step in steps:
        layers = [value for value in step.get(SIMILARITY) or [] if value is not None]
        if layers:
            rows.append((step["iteration"], np.mean(layers), min(layers), max(layers)))
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _losses(panel: Axes, run: Run, colour: str, scale: float) -> None:
    """Against `scale` times the step."""
    panel.plot(scale * run.loss[:, 0], run.loss[:, 1], color=colour, linewidth=0.8, alpha=0.3)
    label = run.label
    if len(run.held_out):
        label += f": {run.held_out[-1, 1]:.3f}"
    points = run.held_out if len(run.held_out) else run.loss
    panel.plot(
        scale * points[:, 0],
        points[:, 1],
        color=colour,
        linewidth=1.8,
        marker="o",
        markersize=4.5 if len(points) <= 60 else 0,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label=label,
    )


def _similarities(panel: Axes, runs: list[Run]) -> None:
    for run, colour in zip(runs, COLOURS, strict=False):
        if len(run.similarity):
            steps, mean, low, high = run.similarity.T
            panel.fill_between(steps, 1 - high, 1 - low, color=colour, alpha=0.15, linewidth=0)
            panel.plot(steps, 1 - mean, color=colour, linewidth=1.8, label=run.label)
    _label(
        panel,
        "How far apart the experts of a layer are",
        "1 - mean cosine between two experts' weights; band: all layers",
        "step",
    )
    panel.set_yscale("log")
    panel.legend(loc="best")


def _label(panel: Axes, title: str, unit: str, below: str) -> None:
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panel.set_title(unit, loc="right", fontsize=9, color=GREY)
    panel.set_xlabel(below)


if __name__ == "__main__":
    sys.exit(main())
