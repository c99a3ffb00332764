"""The timeline of an iteration as a picture: a row for each pipeline rank, a box for each pass."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_moe.plan.show.boxes import KINDS, Boxes, Window, windows
from megatron_moe.plan.show.picture_style import BLUE, GREEN, GREY, GRID, INK, ORANGE, PINK, SKY, YELLOW
from megatron_moe.plan.wording import number

_COLORS = dict(zip(KINDS, (BLUE, YELLOW, ORANGE, GREEN, SKY, PINK), strict=True))
_NUMBERED = ("forward", "backward", "weight gradients")
_DARK = 0.5
"""Brightness below which a white number is read best."""
_BOX = 0.84
"""Height of a box, of its row."""
_LARGEST, _SMALLEST = 7.5, 4.2
"""Sizes of the numbers, in points."""
_DIGIT = 0.64
"""Width of a digit, of its size."""
_GAP = 0.16
"""Between the pieces of an iteration that is cut, in inches."""
_TICK = 0.65
"""Room for a time on the axis, in inches."""
_PALEST = 0.45
"""White in the colour of a rank's last chunk."""


def draw_timeline(
    figure: Figure, box: tuple[float, float, float, float], boxes: Boxes, unit_s: float
) -> None:
    """Draw into a figure.

    Args:
        box: left, bottom, width and height in inches.
        unit_s: seconds of the unit of the time axis.
    """
    shown = windows(boxes)
    left, bottom, width, height = box
    page_width, page_height = figure.get_size_inches()
    inches_a_second = (width - _GAP * (len(shown) - 1)) / sum(end - start for start, end in shown)
    for window in shown:
        inches = inches_a_second * (window[1] - window[0])
        place = (left / page_width, bottom / page_height, inches / page_width, height / page_height)
        panel = figure.add_axes(place)
        seen = boxes.within(window)
        _rows(panel, boxes.ranks, window)
        _boxes(panel, seen, boxes.chunks)
        _numbers(panel, seen, boxes.chunks, 72 * inches_a_second, 72 * height / boxes.ranks)
        _time_axis(panel, inches, unit_s)
        panel.tick_params(axis="y", left=False, labelleft=window is shown[0])
        left += inches + _GAP
        if window is not shown[-1]:
            x, y = (left - _GAP / 2) / page_width, (bottom - 0.1) / page_height
            figure.text(x, y, "...", color=GREY, ha="center", va="center")


def legend(boxes: Boxes) -> list[Patch]:
    """A patch for each kind of box that is there."""
    there = [name for name in KINDS if boxes.of(name).any()]
    patches = [Patch(color=_COLORS[name], label=name) for name in there]
    return patches + [Patch(color=GRID, label="idle")] * (boxes.ranks > 1)


def label_rows(panel: Axes, ranks: int) -> None:
    """Pipeline ranks beside their rows, the first one above; of many, some."""
    panel.set_ylim(ranks - 0.5, -0.5)
    numbers = range(0, ranks, max(1, ranks // 16))
    panel.set_yticks(numbers, [f"rank {number}" for number in numbers])
    panel.tick_params(axis="y", left=False)
    panel.spines[["left", "bottom"]].set_visible(False)


def _rows(panel: Axes, ranks: int, window: Window) -> None:
    """A pale band for each rank: where no box covers it, the rank waits."""
    panel.set_xlim(*window)
    panel.barh(range(ranks), window[1] - window[0], _BOX, window[0], color=GRID, linewidth=0)
    label_rows(panel, ranks)
    panel.grid(visible=False)


def _time_axis(panel: Axes, inches: float, unit_s: float) -> None:
    """Round numbers of the unit; in a narrow piece its end."""
    low, high = (limit / unit_s for limit in panel.get_xlim())
    places = [high]
    if inches > 2 * _TICK:
        found = MaxNLocator(int(inches / _TICK), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        # A number at the edge would stand on the dots that say something is left out.
        edge = 0.2 / inches * (high - low)
        places = [place for place in found if low + edge <= place <= high or place == low]
    panel.set_xticks([place * unit_s for place in places])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value / unit_s)))


def _boxes(panel: Axes, boxes: Boxes, chunks: int) -> None:
    low, high = boxes.rank - _BOX / 2, boxes.rank + _BOX / 2
    corners = np.stack([boxes.start, low, boxes.end, low, boxes.end, high, boxes.start, high], axis=1)
    colors = np.array([[_shade(_COLORS[name], chunk, chunks) for chunk in range(chunks)] for name in KINDS])
    collection = PolyCollection(
        list(corners.reshape(-1, 4, 2)),
        facecolors=colors[boxes.kind, boxes.chunk],
        edgecolors="white",
        linewidths=0.35,
    )
    panel.add_collection(collection, autolim=False)


def _shade(color: str, chunk: int, chunks: int) -> tuple[float, float, float]:
    """Paler for later chunks."""
    pale = _PALEST * chunk / max(chunks - 1, 1)
    red, green, blue = (part + pale * (1 - part) for part in to_rgb(color))
    return red, green, blue


def _numbers(panel: Axes, boxes: Boxes, chunks: int, points_a_second: float, row_points: float) -> None:
    """The microbatch in each box that has room for it."""
    widths = points_a_second * (boxes.end - boxes.start)
    numbered = boxes.of(*_NUMBERED)
    if not numbered.any():
        return
    # So large that two digits fit into the narrowest kind of box, or as small as can be read.
    narrowest = min(float(np.median(widths[boxes.of(name)])) for name in _NUMBERED if boxes.of(name).any())
    size = min(_LARGEST, 0.62 * row_points, max(_SMALLEST, (narrowest - 1) / (2 * _DIGIT)))
    if size < _SMALLEST:
        return
    for index in np.flatnonzero(numbered):
        text = str(boxes.microbatch[index])
        if widths[index] < len(text) * _DIGIT * size + 0.4:
            continue
        red, green, blue = _shade(_COLORS[KINDS[boxes.kind[index]]], boxes.chunk[index], chunks)
        is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < _DARK
        panel.text(
            (boxes.start[index] + boxes.end[index]) / 2,
            boxes.rank[index],
            text,
            color="white" if is_dark else INK,
            fontsize=size,
            ha="center",
            va="center_baseline",
        )
