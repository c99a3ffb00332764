"""The measured timeline of one step, in the form in which the planner writes the planned one."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moe.config.errors import not_written
from megatron_moe.engine.schedule import Pass
from megatron_moe.engine.stopwatch import BACKWARD, FORWARD, GRADIENTS, Span
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.trace import Category, Event, chrome_trace

FILE = "timeline.json"
UPDATE = "update of weights"
"""What the optimizer's span is called."""


def write(
    path: Path,
    iteration: int,
    layout: Layout,
    made_s: float,
    spans: Sequence[Span],
    waits: Sequence[tuple[float, float]],
    order: Sequence[Pass],
) -> None:
    """Rank 0 writes the file, whole or not at all. A collective over the world.

    Of each pipeline rank one rank is shown, the first. Raises InputError on rank 0 where the file cannot be
    written, or RunError on a full disk.

    Args:
        made_s: when this rank's stopwatch was made, behind a barrier.
        spans: what this rank did in the step.
        waits: begin and end, in seconds of the step, of what it waited for experts' tokens.
        order: the passes of this rank, forward and backward each in its order.
    """
    place = layout.coordinates(dist.get_rank())
    is_shown = (place.tp, place.cp, place.dp) == (0, 0, 0)
    mine = list(events(spans, waits, order, place.pp)) if is_shown else []
    of_ranks: list[tuple[str, float, list[Event]]] = [("", 0.0, [])] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (_machine(), made_s, mine))
    if dist.get_rank() != 0:
        return
    shown = _on_one_clock(of_ranks)
    text = json.dumps(chrome_trace(shown, origin="measured", details={"iteration": iteration}))
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise not_written(f"{path}: the timeline cannot be written", error) from error


def events(
    spans: Sequence[Span], waits: Sequence[tuple[float, float]], order: Sequence[Pass], pipeline_rank: int
) -> Iterator[Event]:
    """What is shown of one rank's step."""
    forward = iter([one for one in order if one.kind == "F"])
    backward = iter([one for one in order if one.kind == "B"])
    for span in spans:
        if span.name == FORWARD:
            yield _pass(span, next(forward), pipeline_rank)
        elif span.name == BACKWARD:
            yield _pass(span, next(backward), pipeline_rank)
        elif span.name == UPDATE:
            yield Event(UPDATE, "optimizer", pipeline_rank, "computation", span.begin_s, span.duration_s)
        elif span.name in GRADIENTS:
            yield _travel(span, "gradients", pipeline_rank)
        elif "recv" in span.name:
            yield _travel(span, "wait", pipeline_rank)
        elif "send" in span.name:
            yield _travel(span, "communication", pipeline_rank)
    for begin, end in waits:
        yield _travel(Span("wait for experts' tokens", begin, end), "communication", pipeline_rank)


def _machine() -> str:
    """Tells machines apart: processes of one share a clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()


def _on_one_clock(of_ranks: Sequence[tuple[str, float, list[Event]]]) -> list[Event]:
    """All events, in seconds since the first rank of each machine left the barrier: a rank may leave it
    milliseconds later."""
    first: dict[str, float] = {}
    for machine, made_s, _ in of_ranks:
        first[machine] = min(made_s, first.get(machine, made_s))
    return [
        replace(event, start_s=event.start_s + made_s - first[machine])
        for machine, made_s, found in of_ranks
        for event in found
    ]


def _pass(span: Span, done: Pass, pipeline_rank: int) -> Event:
    return Event(
        f"{done.kind}{done.microbatch}",
        "forward" if done.kind == "F" else "backward",
        pipeline_rank,
        "computation",
        span.begin_s,
        span.duration_s,
        {"chunk": done.chunk, "microbatch": done.microbatch},
    )


def _travel(span: Span, category: Category, pipeline_rank: int) -> Event:
    name = span.name.replace("-", " ").replace("recv", "receive")
    return Event(name, category, pipeline_rank, "communication", span.begin_s, span.duration_s)
