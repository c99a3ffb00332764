"""A timeline as Chrome's trace format, which ui.perfetto.dev and chrome://tracing show.

The planned timeline and the measured one have the same form, so that they can be laid over each other: a
process is a pipeline rank, its thread 0 what it computes, its thread 1 what it sends and waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_moe.plan.forecast import Forecast
from megatron_moe.plan.schedules import LeftOut, Timeline

Category = Literal["forward", "backward", "wait", "communication", "gradients", "optimizer", "left out"]
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


def planned_events(
    timeline: Timeline, forecast: Forecast, recompute_s: Sequence[float], transfer_s: float
) -> list[Event]:
    """A simulated iteration. What a rank computes, sends and waits for leaves no time out.

    Args:
        recompute_s: of each stage, the part of its backward pass in which it computes again.
        transfer_s: sending one microbatch to the next stage.
    """
    ranks = len(timeline.idle_s)
    of_rank: list[list[Event]] = [[] for _ in range(ranks)]
    for event in _passes(timeline, recompute_s):
        of_rank[event.pipeline_rank].append(event)
    events = []
    for passes in of_rank:
        events += passes
        # Chunks of one rank hand on what they make without a message.
        sent_s = transfer_s if ranks > 1 else 0.0
        events += _communication(passes, len(recompute_s), sent_s, timeline.makespan_s, timeline.left_out)
        events += _left_out(passes, timeline.left_out)
        events += _update(passes[0].pipeline_rank, timeline.makespan_s, forecast)
    return events


def _passes(timeline: Timeline, recompute_s: Sequence[float]) -> Iterator[Event]:
    ranks = len(timeline.idle_s)
    columns = (timeline.pipeline_ranks, timeline.stages, timeline.microbatches, timeline.kinds)
    for rank, stage, microbatch, kind, start, end in zip(
        *columns, timeline.starts_s, timeline.ends_s, strict=True
    ):
        args: dict[str, float] = {"chunk": stage // ranks, "stage": stage, "microbatch": microbatch}
        if kind == "B" and recompute_s[stage]:
            args["recompute_ms"] = 1e3 * recompute_s[stage]
        category: Category = "forward" if kind == "F" else "backward"
        yield Event(f"{kind}{microbatch}", category, rank, "computation", start, end - start, args)


def _communication(
    passes: Sequence[Event], num_stages: int, transfer_s: float, end_s: float, left_out: LeftOut | None
) -> Iterator[Event]:
    """Sends to other stages, and waits: the time in which a rank neither computes nor sends. Of two sends at
    the same time the later is shown from the other's end on."""
    rank, computed_s, sent_s = passes[0].pipeline_rank, 0.0, 0.0
    for event in passes:
        if left_out and computed_s < left_out.start_s + left_out.seconds <= event.start_s:
            yield from _wait(rank, max(computed_s, sent_s), event.start_s - left_out.seconds, end_s)
        else:
            yield from _wait(rank, max(computed_s, sent_s), event.start_s, end_s)
        computed_s = event.start_s + event.duration_s
        stage, is_forward = int(event.args["stage"]), event.name.startswith("F")
        if not transfer_s or event.name.startswith("W") or stage == (num_stages - 1 if is_forward else 0):
            continue
        start_s, sent_s = max(computed_s, sent_s), computed_s + transfer_s
        to_stage = {"to_stage": stage + (1 if is_forward else -1)}
        yield Event(
            f"send {event.name}", "communication", rank, "communication", start_s, sent_s - start_s, to_stage
        )
    yield from _wait(rank, max(computed_s, sent_s), end_s, end_s)


def _left_out(passes: Sequence[Event], left_out: LeftOut | None) -> Iterator[Event]:
    """One event in the place of passes that repeat those before it."""
    if left_out is None:
        return
    until_s = min(event.start_s for event in passes if event.start_s >= left_out.start_s + left_out.seconds)
    name = f"{left_out.microbatches:,} microbatches as before"
    yield Event(
        name,
        "left out",
        passes[0].pipeline_rank,
        "computation",
        until_s - left_out.seconds,
        left_out.seconds,
        {"microbatches": left_out.microbatches},
    )


def _wait(rank: int, start_s: float, end_s: float, whole_s: float) -> Iterator[Event]:
    # Less is rounding.
    if end_s - start_s > 1e-9 * whole_s:
        yield Event("wait", "wait", rank, "communication", start_s, end_s - start_s)


def _update(rank: int, start_s: float, forecast: Forecast) -> Iterator[Event]:
    """What ends an iteration: gradients are reduced and weights gathered, and the optimizer steps."""
    if forecast.gradient_s > 0:
        yield Event("reduce and gather", "gradients", rank, "communication", start_s, forecast.gradient_s)
    if forecast.optimizer_s > 0:
        start_s += forecast.gradient_s
        yield Event("update of weights", "optimizer", rank, "computation", start_s, forecast.optimizer_s)
