"""A planned iteration as boxes on rows, and which of a long one are worth showing. Numpy is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moe.plan.forecast import Forecast
from megatron_moe.plan.schedules import LeftOut, Timeline

KINDS = ("forward", "recompute", "backward", "weight gradients", "reduce and gather", "optimizer")
_NONE = -1
_MOST_ROUNDS = 30
"""Forward and backward passes of a microbatch that stand side by side over a whole page; more are cut."""
_LONG_TAIL = 0.3
"""Part of the last window of the pipeline; what ends the iteration and is longer is cut."""

Window = tuple[float, float]
"""Beginning and end of what is shown, in seconds."""


@dataclass(frozen=True)
class Boxes:
    """Columns of equal length, a box each.

    Attributes:
        kind: index into KINDS.
        rank: pipeline rank, the row.
        chunk: of the rank.
        microbatch: -1 where it belongs to none.
        start, end: in seconds.
        left_out: passes that have no box.
    """

    kind: np.ndarray
    rank: np.ndarray
    chunk: np.ndarray
    microbatch: np.ndarray
    start: np.ndarray
    end: np.ndarray
    left_out: LeftOut | None = None

    @property
    def ranks(self) -> int:
        """Rows."""
        return int(self.rank.max()) + 1

    @property
    def chunks(self) -> int:
        """Of a rank."""
        return int(self.chunk.max()) + 1

    def of(self, *names: str) -> np.ndarray:
        """Which boxes are of these kinds."""
        return np.isin(self.kind, [KINDS.index(name) for name in names])

    def within(self, window: Window) -> Boxes:
        """What is seen in a window, cut at its sides."""
        seen = (self.end > window[0]) & (self.start < window[1])
        start, end = np.clip(self.start[seen], *window), np.clip(self.end[seen], *window)
        return Boxes(self.kind[seen], self.rank[seen], self.chunk[seen], self.microbatch[seen], start, end)


def boxes_of(timeline: Timeline, recompute_s: Sequence[float], forecast: Forecast) -> Boxes:
    """The passes of the pipeline, and behind them what ends an iteration.

    Args:
        recompute_s: of each stage, the part of its backward pass in which it computes again.
    """
    ranks = len(timeline.idle_s)
    passes, stages = np.array(timeline.kinds), np.array(timeline.stages)
    rank, microbatch = np.array(timeline.pipeline_ranks), np.array(timeline.microbatches)
    start, end = np.array(timeline.starts_s), np.array(timeline.ends_s)
    split = np.where(passes == "B", start + np.array(recompute_s, dtype=float)[stages], start)
    columns = [
        (
            KINDS.index(name),
            rank[chosen],
            stages[chosen] // ranks,
            microbatch[chosen],
            begin[chosen],
            stop[chosen],
        )
        for name, chosen, begin, stop in (
            ("forward", passes == "F", start, end),
            ("recompute", split > start, start, split),
            ("backward", passes == "B", split, end),
            ("weight gradients", passes == "W", start, end),
        )
    ]
    every, none = np.arange(ranks), np.full(ranks, _NONE)
    now = timeline.makespan_s
    for name, seconds in (("reduce and gather", forecast.gradient_s), ("optimizer", forecast.optimizer_s)):
        if seconds > 0:
            begin, now = now, now + seconds
            stop = np.full(ranks, now)
            columns.append((KINDS.index(name), every, 0 * every, none, np.full(ranks, begin), stop))
    kind = np.concatenate([np.full(len(column[1]), column[0]) for column in columns])
    rank, chunk, microbatch, start, end = (
        np.concatenate(parts) for parts in zip(*(column[1:] for column in columns), strict=True)
    )
    return Boxes(kind, rank, chunk, microbatch, start, end, timeline.left_out)


def windows(boxes: Boxes) -> list[Window]:
    """The whole iteration; of a long one the beginning, a piece of the middle, and the end. A long time
    behind the pipeline is cut, too."""
    passes = boxes.of("forward", "recompute", "backward", "weight gradients")
    pipeline, whole = float(boxes.end[passes].max()), float(boxes.end.max())
    shown = _of_pipeline(boxes, pipeline)
    last = shown[-1][1] - shown[-1][0]
    if whole - pipeline <= _LONG_TAIL * last:
        return [*shown[:-1], (shown[-1][0], whole)]
    piece = _LONG_TAIL / 4 * last
    return [*shown[:-1], (shown[-1][0], pipeline + piece), (whole - piece, whole)]


def _of_pipeline(boxes: Boxes, whole: float) -> list[Window]:
    """Windows of the passes, the last of which ends at `whole`."""
    forward, backward = boxes.of("forward"), boxes.of("recompute", "backward")
    # A round is one forward and one backward pass of a chunk.
    round_s = float((boxes.end - boxes.start)[forward | backward].sum() / np.count_nonzero(forward))
    if whole <= _MOST_ROUNDS * round_s:
        return [(0.0, whole)]
    # The pipeline fills until the first rank's first backward pass, and drains from the last one's last
    # forward pass on.
    filled = float(boxes.start[backward & (boxes.rank == 0)].min())
    drained = whole - float(boxes.end[forward & (boxes.rank == boxes.ranks - 1)].max())
    least = _MOST_ROUNDS / 4 * round_s
    first, last = max(filled, least) + 2 * round_s, max(drained, least) + 2 * round_s
    middle = 0.3 * (first + last)
    if first + middle + last > 0.85 * whole:
        return [(0.0, whole)]
    center = (first + whole - last) / 2
    if boxes.left_out is not None:
        # Of passes that are left out those before them stand in the middle.
        center = min(center, boxes.left_out.start_s - middle)
    return [(0.0, first), (center - middle / 2, center + middle / 2), (whole - last, whole)]
