"""`plan --plot`: the timeline of an iteration above the memory of each pipeline rank, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_moe.plan.forecast import MemoryForecast
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.schedules import Timeline
from megatron_moe.plan.show import memory_panel, timeline_panel
from megatron_moe.plan.show.boxes import boxes_of
from megatron_moe.plan.show.picture_style import GREY, INK, RED, STYLE
from megatron_moe.plan.wording import BYTES, SECONDS, duration, in_one_unit, percent, plural

_WIDTH, _LEFT, _RIGHT = 11.0, 0.75, 0.25
_WORDS = 1.65
"""Room for words behind the rows, in inches, as all of these."""
_TOP, _TITLE, _LIMIT, _BETWEEN, _BOTTOM = 0.5, 0.42, 0.12, 0.4, 0.36
_TALLEST_ROW, _LEAST_ROW, _ROWS = 0.34, 0.08, 4.6
_FEW_POINTS = 7.0
"""Rows below that have no room for words."""


def picture(
    name: str, device: str, plan: Plan, timeline: Timeline, recompute_s: Sequence[float], form: str
) -> bytes:
    """The picture as a file's content.

    Args:
        device: what a rank computes on, in a word.
        recompute_s: of each stage, the part of its backward pass in which it computes again.
        form: png, svg or pdf.
    """
    with rc_context({**rcParamsDefault, **STYLE, "svg.hashsalt": name}):
        figure = figure_of(name, device, plan, timeline, recompute_s)
        content = BytesIO()
        # A date would make each file of the same plan another one.
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(content, format=form, metadata=dates.get(form))
    return content.getvalue()


def figure_of(name: str, device: str, plan: Plan, timeline: Timeline, recompute_s: Sequence[float]) -> Figure:
    """Both panels, their rows as high as their number allows."""
    forecast = plan.forecast
    memories = [rank.memory for rank in forecast.ranks]
    row = max(_LEAST_ROW, min(_TALLEST_ROW, _ROWS / len(memories)))
    rows = len(memories) * row
    height = _TOP + _TITLE + rows + _BETWEEN + _TITLE + _LIMIT + rows + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    top = 1 - 0.34 / height
    figure.text(_LEFT / _WIDTH, top, name, fontsize=14, fontweight="bold", va="baseline")
    figure.text(1 - _RIGHT / _WIDTH, top, _summary(device, plan), color=GREY, ha="right", va="baseline")

    bottom = _BOTTOM + rows + _LIMIT + _TITLE + _BETWEEN
    boxes = boxes_of(timeline, recompute_s, forecast)
    unit, _ = in_one_unit([forecast.iteration_s], SECONDS)
    box = (_LEFT, bottom, _WIDTH - _LEFT - _WORDS, rows)
    timeline_panel.draw_timeline(figure, box, boxes, dict(SECONDS)[unit])
    if len(memories) > 1:
        idle = [f"idle {percent(rank.idle_s / forecast.pipeline_s)}" for rank in forecast.ranks]
        _behind_rows(figure.axes[-1], idle, [GREY] * len(idle), row)
    words = f"of an iteration in {unit}, microbatches numbered"
    _head(figure, bottom + rows, "Timeline", words, timeline_panel.legend(boxes))

    unit, number = in_one_unit([memory.total for memory in memories], BYTES)
    place = (_LEFT / _WIDTH, _BOTTOM / height, 1 - (_LEFT + _WORDS) / _WIDTH, rows / height)
    panel = figure.add_axes(place)
    memory_panel.draw_memory(panel, memories, dict(BYTES)[unit])
    timeline_panel.label_rows(panel, len(memories))
    totals = [number(memory.total) + _free(memory, number) for memory in memories]
    _behind_rows(panel, totals, [RED if (memory.headroom or 0) < 0 else INK for memory in memories], row)
    _head(
        figure,
        _BOTTOM + rows + _LIMIT,
        "Memory",
        f"of each {device} in {unit}",
        memory_panel.legend(memories),
    )
    return figure


def _summary(device: str, plan: Plan) -> str:
    forecast = plan.forecast
    axes = f" ({plan.layout.axes})" if plan.layout.axes else ""
    parts = [
        plural(plan.layout.world_size, device) + axes,
        f"{duration(forecast.iteration_s)} an iteration",
        f"{forecast.tokens_per_second_per_gpu:,.0f} tokens/s/{device}",
    ]
    if forecast.mfu is not None:
        parts.append(f"MFU {percent(forecast.mfu)}")
    return "   ".join(parts)


def _free(memory: MemoryForecast, number: Callable[[float], str]) -> str:
    if memory.headroom is None:
        return ""
    return f", {number(abs(memory.headroom))} {'free' if memory.headroom >= 0 else 'too much'}"


def _behind_rows(panel: Axes, texts: Sequence[str], colors: Sequence[str], row: float) -> None:
    """Words at the right of each row that is high enough."""
    points = 72 * row
    if points < _FEW_POINTS:
        return
    for number, (text, color) in enumerate(zip(texts, colors, strict=True)):
        panel.text(
            1.0,
            number,
            f"  {text}",
            transform=panel.get_yaxis_transform(),
            color=color,
            fontweight="bold" if color == RED else "normal",
            fontsize=min(8.5, 0.62 * points),
            va="center_baseline",
        )


def _head(figure: Figure, bottom: float, title: str, words: str, patches: Sequence[Patch]) -> None:
    """What stands above a panel, from `bottom` inches on."""
    height = figure.get_size_inches()[1]
    place = (_LEFT / _WIDTH, (bottom + 0.16) / height)
    text = figure.text(*place, title, fontsize=10, fontweight="bold", va="baseline")
    end = text.get_window_extent().x1 / figure.dpi + 0.1
    figure.text(end / _WIDTH, place[1], words, color=GREY, va="baseline")
    figure.legend(
        handles=patches,
        ncols=len(patches),
        loc="lower right",
        bbox_to_anchor=(1 - _RIGHT / _WIDTH, (bottom + 0.11) / height),
        borderpad=0.0,
        borderaxespad=0.0,
        handlelength=1.0,
        handleheight=0.9,
        columnspacing=1.3,
    )
