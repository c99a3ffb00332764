"""Memory of each pipeline rank as a picture: a bar of its parts, and the limit."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_moe.plan.forecast import MemoryForecast
from megatron_moe.plan.show.picture_style import GREEN, PINK, RED, SKY
from megatron_moe.plan.wording import memory

_COLORS = {
    "weights": "#1f3a5f",
    "gradients": SKY,
    "optimizer": GREEN,
    "activations": PINK,
    "working": "#ecd0e0",
    "reserved": "#c3c8cf",
}
_BAR = 0.72
"""Height of a bar, of its row."""
_FAR = 3.0
"""Times what lies in memory, a limit is too far away to be drawn."""


def draw_memory(panel: Axes, memories: Sequence[MemoryForecast], unit_bytes: float) -> None:
    """Draw into axes with a row a rank."""
    ranks = range(len(memories))
    before = [0.0] * len(memories)
    for name, color in _COLORS.items():
        widths = [getattr(parts, name) / unit_bytes for parts in memories]
        panel.barh(ranks, widths, _BAR, before, color=color, edgecolor="white", linewidth=0.35)
        before = [start + width for start, width in zip(before, widths, strict=True)]
    largest, limit = max(before), memories[0].limit
    is_near = limit is not None and limit / unit_bytes < _FAR * largest
    panel.set_xlim(0, 1.01 * max(largest, limit / unit_bytes if limit is not None and is_near else 0.0))
    panel.grid(visible=False, axis="y")
    panel.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 2.5, 4, 5, 10]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    if limit is None:
        return
    if is_near:
        panel.axvline(limit / unit_bytes, color=RED, linewidth=1.2, linestyle=(0, (4, 2)))
    panel.annotate(
        f"limit {memory(limit)}" + ("" if is_near else ", far to the right"),
        (limit / unit_bytes, 1.0) if is_near else (1.0, 1.0),
        xycoords=("data", "axes fraction") if is_near else "axes fraction",
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=RED,
        fontsize=8,
    )


def legend(memories: Sequence[MemoryForecast]) -> list[Patch]:
    """A patch for each part that is there."""
    there = [name for name in _COLORS if any(getattr(parts, name) > 0 for parts in memories)]
    return [Patch(color=_COLORS[name], label=name) for name in there]
