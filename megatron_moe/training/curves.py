"""A run's curves as a picture: loss, learning rate, and for MoE models what the router does."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_moe.plan.show.picture_style import BLUE, GREEN, GREY, PINK, RED, SKY, STYLE, VERMILION
from megatron_moe.plan.wording import count

Columns = dict[str, np.ndarray]
"""Key -> one number a step, NaN where there is none."""

_KEYS = (
    "iteration",
    "loss",
    "eval/loss",
    "lr",
    "lr/embedding",
    "lr/experts",
    "consumed_tokens",
    "moe/drop_rate",
    "moe/would_drop_rate",
    "eval/drop_rate",
    "moe/load_max_over_mean",
    "moe/router_entropy",
    "skipped",
)
_RATE = "#4b5563"
_OWN_RATES = {"lr/embedding": PINK, "lr/experts": GREEN}
_ROUTER = {
    "moe/load_max_over_mean": ("Busiest expert", "times the mean load; 1 is perfect balance", PINK),
    "moe/router_entropy": ("Router entropy", "nats; low is sure, log of the experts is undecided", SKY),
}
"""Key -> title, unit and colour of a panel of its own."""
_ROUND = [1, 2, 2.5, 5, 10]
_SMOOTHED_FROM = 100
"""Steps from which on a line shows the mean over neighbours, the raw one pale behind it."""


def draw(metrics: Path, picture: Path, name: str) -> None:
    """Draw the curves of a metrics.jsonl into a PNG file, which is there whole or not at all."""
    steps = read(metrics)
    with rc_context({**rcParamsDefault, **STYLE}):
        figure = figure_of(steps, name)
        aside = picture.with_name(f".{picture.name}.part")
        FigureCanvasAgg(figure).print_png(str(aside))
    os.replace(aside, picture)


def read(metrics: Path) -> Columns:
    """What is drawn of a metrics.jsonl; `skipped` is 1 for a step that changed no weight."""
    rows: list[list[float]] = []
    with metrics.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                rows.append([_number(record.get(key)) for key in _KEYS])
            except (ValueError, AttributeError):
                continue  # a line that another program tore; the trainer says so when it resumes
    table = np.array(rows, dtype=np.float64).reshape(-1, len(_KEYS))
    return {key: table[:, index] for index, key in enumerate(_KEYS)}


def _number(value: Any) -> float:
    return 1.0 if isinstance(value, str) else math.nan if value is None else float(value)


def figure_of(steps: Columns, name: str) -> Figure:
    """One panel a subject, over the same iterations."""
    drops = next((key for key in ("moe/would_drop_rate", "moe/drop_rate") if _has(steps, key)), None)
    further = [key for key in _ROUTER if _has(steps, key)]
    heights = [3.2, 1.3] + ([1.3] if drops else []) + [1.1] * len(further)
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1, hspace=0.03)
    size = (8.0, 1.25 + 1.05 * sum(heights))
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout=layout)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(name, x=0.012, ha="left", fontsize=14, fontweight="bold")
    figure.text(0.988, 0.982, _summary(steps), ha="right", va="top", color=GREY)
    _loss(panels[0], steps)
    _learning_rate(panels[1], steps)
    if drops:
        _drop_rate(panels[2], steps, drops)
    for panel, key in zip(panels[len(panels) - len(further) :], further, strict=True):
        title, unit, color = _ROUTER[key]
        _title(panel, title, unit)
        _line(panel, steps, key, color, "")
    for panel in panels:
        panel.yaxis.set_major_locator(MaxNLocator(6 if panel is panels[0] else 4, steps=_ROUND))
    _iterations(panels[-1], steps["iteration"])
    return figure


def _summary(steps: Columns) -> str:
    """How far the run has come, and where it stands."""
    parts = []
    if len(steps["iteration"]):
        number, tokens = int(steps["iteration"][-1]), float(steps["consumed_tokens"][-1])
        parts.append(f"{number:,} iteration{'s' * (number != 1)}")
        if not math.isnan(tokens):
            parts.append(f"{count(tokens)} tokens")
    for key, text in (("loss", "loss"), ("eval/loss", "held-out")):
        if _has(steps, key):
            parts.append(f"{text} {steps[key][~np.isnan(steps[key])][-1]:.4f}")
    return "   ".join(parts)


def _loss(panel: Axes, steps: Columns) -> None:
    _title(panel, "Loss", "nats a token")
    _line(panel, steps, "loss", BLUE, "training")
    if _has(steps, "eval/loss"):
        _held_out(panel, steps, "eval/loss")
    skipped = steps["iteration"][steps["skipped"] == 1]
    if len(skipped):
        panel.plot(
            skipped,
            np.full(len(skipped), 0.03),
            color=RED,
            linestyle="none",
            marker="^",
            transform=panel.get_xaxis_transform(),
            label="step skipped",
        )
    if len(steps["iteration"]) == 1:
        panel.set_ylim(bottom=0, top=panel.get_ylim()[1] * 1.25)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="upper right")


def _held_out(panel: Axes, steps: Columns, key: str) -> None:
    there = ~np.isnan(steps[key])
    panel.plot(
        steps["iteration"][there],
        steps[key][there],
        color=VERMILION,
        linewidth=1.4,
        marker="o",
        markersize=5 if np.count_nonzero(there) <= 60 else 0,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label="held-out",
    )


def _learning_rate(panel: Axes, steps: Columns) -> None:
    _title(panel, "Learning rate")
    own = {key: color for key, color in _OWN_RATES.items() if _has(steps, key)}
    _line(panel, steps, "lr", _RATE, "all other weights" if own else "")
    for key, color in own.items():
        _line(panel, steps, key, color, key.removeprefix("lr/"))
    if own:
        panel.legend(loc="upper right")
    panel.set_ylim(bottom=0)
    largest = max((np.nanmax(steps[key]) for key in ("lr", *own) if _has(steps, key)), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    panel.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 10.0**exponent:g}e{exponent}" if value else "0")
    )


def _drop_rate(panel: Axes, steps: Columns, key: str) -> None:
    if key == "moe/drop_rate":
        _title(panel, "Drop rate", "share of assignments")
    else:
        _title(panel, "Would-drop rate", "share of assignments beyond a capacity limit; nothing is dropped")
    is_evaluated = key == "moe/drop_rate" and _has(steps, "eval/drop_rate")
    _line(panel, steps, key, GREEN, "training" if is_evaluated else "")
    if is_evaluated:
        _held_out(panel, steps, "eval/drop_rate")
        panel.legend(loc="upper right")
    panel.set_ylim(bottom=0, top=None if np.nanmax(steps[key]) > 0 else 0.01)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _iterations(panel: Axes, iterations: np.ndarray) -> None:
    panel.set_xlabel("iteration")
    panel.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1, steps=_ROUND))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(iterations):
        room = max((iterations[-1] - iterations[0]) * 0.015, 0.5)
        panel.set_xlim(iterations[0] - room, iterations[-1] + room)


def _line(panel: Axes, steps: Columns, key: str, color: str, label: str) -> None:
    x, y = steps["iteration"], steps[key]
    alone = np.count_nonzero(~np.isnan(y)) <= 1
    if len(x) < _SMOOTHED_FROM or key.startswith("lr"):
        marker = "o" if alone else None
        panel.plot(x, y, color=color, linewidth=1.6, marker=marker, markersize=5, label=label)
        return
    window = max(5, len(x) // 50) | 1
    panel.plot(x, y, color=color, linewidth=0.7, alpha=0.4)
    text = f"{label}, mean of {window} steps" if label else None
    panel.plot(x, _smoothed(y, window), color=color, linewidth=1.8, label=text)


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over the `window` neighbours that are there, fewer at the ends; NaN where there are none."""
    there = ~np.isnan(values)
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return np.where((number > 0) & there, means, np.nan)


def _title(panel: Axes, title: str, unit: str = "") -> None:
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panel.set_title(unit, loc="right", fontsize=9, color=GREY)


def _has(steps: Columns, key: str) -> bool:
    return not np.isnan(steps[key]).all()
