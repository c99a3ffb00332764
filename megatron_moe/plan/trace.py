"""A timeline as Chrome's trace format, which ui.perfetto.dev and chrome://tracing show.

The planned timeline and the measured one have the same form, so that they can be laid over each other: a
process is a pipeline rank, its thread 0 what it computes, its thread 1 what it sends and waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Category = Literal["forward", "backward", "wait", "communication", "gradients", "optimizer"]
Lane = Literal["computation", "communication"]

LANES: tuple[Lane, ...] = ("computation", "communication")
"""A lane's place is its thread's number. Events of one lane of one process do not overlap."""


@dataclass(frozen=True)
class Event:
    """What one pipeline rank does for a while.

    Attributes:
        name: `F3`, `B3`, `W3` for the forward, the backward and a put-off weight gradient pass of
            microbatch 3, which count from 0; words otherwise.
        start_s: from the beginning of the iteration.
        pipeline_rank: where; of a measured timeline, whose ranks are several a pipeline rank, the one shown.
        args: more to say, such as `{"chunk": 0, "microbatch": 3}`.
    """

    name: str
    category: Category
    pipeline_rank: int
    lane: Lane
    start_s: float
    duration_s: float
    args: Mapping[str, int | float | str] = field(default_factory=dict)


def chrome_trace(
    events: Iterable[Event],
    *,
    origin: Literal["planned", "measured"],
    details: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """The object that goes into a trace file.

    Args:
        origin: what the names of processes say of the times.
        details: what else the file says of the run, under `otherData`.
    """
    shown = sorted(events, key=lambda event: (event.pipeline_rank, LANES.index(event.lane), event.start_s))
    lanes = sorted({(event.pipeline_rank, LANES.index(event.lane)) for event in shown})
    records = []
    for rank in sorted({rank for rank, _ in lanes}):
        name = {"name": f"pipeline rank {rank}, {origin}"}
        records += [
            _about(rank, "process_name", name),
            _about(rank, "process_sort_index", {"sort_index": rank}),
        ]
    for rank, lane in lanes:
        records += [
            _about(rank, "thread_name", {"name": LANES[lane]}, lane),
            _about(rank, "thread_sort_index", {"sort_index": lane}, lane),
        ]
    return {
        "traceEvents": records + [_complete(event) for event in shown],
        "displayTimeUnit": "ms",
        "otherData": {"origin": origin, **(details or {})},
    }


def _about(rank: int, what: str, args: Mapping[str, object], lane: int = 0) -> dict[str, Any]:
    """A metadata event: the name or the place of a process or thread."""
    return {"ph": "M", "name": what, "pid": rank, "tid": lane, "args": dict(args)}


def _complete(event: Event) -> dict[str, Any]:
    """An event with a beginning and a duration, in microseconds."""
    return {
        "ph": "X",
        "name": event.name,
        "cat": event.category,
        "pid": event.pipeline_rank,
        "tid": LANES.index(event.lane),
        "ts": 1e6 * event.start_s,
        "dur": 1e6 * event.duration_s,
        "args": dict(event.args),
    }
