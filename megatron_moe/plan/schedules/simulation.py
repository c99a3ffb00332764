"""An exact event simulation of pipeline schedules.

Assumptions: each rank runs one pass at a time, in its schedule's order; every microbatch takes a stage
equally long; a transfer to another rank takes a fixed time under whatever both ranks compute meanwhile, and
transfers do not wait for each other. So a pass starts when its rank is free and its input has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.plan.schedules.orders import Kind, Op, ScheduleName, order_of
from megatron_moe.plan.schedules.timeline import Timeline


@dataclass(frozen=True)
class StageTimes:
    """What one microbatch costs on one stage."""

    forward_s: float
    backward_s: float
    """Whole, with the gradients of the weights."""
    weight_gradient_s: float = 0.0
    """The part of `backward_s` that `zero-bubble` puts off; other schedules run it with the rest."""
    kept_bytes: float = 0.0
    """Activations from the start of the forward to the end of the last backward pass."""


def simulate_whole(
    name: ScheduleName,
    stages: Sequence[StageTimes],
    pipeline_size: int,
    num_microbatches: int,
    transfer_s: float = 0.0,
) -> Timeline:
    """One iteration, pass by pass.

    Args:
        stages: PP x VPP of them in the order in which a token passes them: stage i is chunk i // PP of rank
            i % PP.
        num_microbatches: of the iteration; for `interleaved` a multiple of PP.
        transfer_s: sending one microbatch's activations, or their gradients, to the next rank.
    """
    assert stages and len(stages) % pipeline_size == 0 and num_microbatches > 0
    chunks = len(stages) // pipeline_size
    orders = [order_of(name, rank, pipeline_size, chunks, num_microbatches) for rank in range(pipeline_size)]
    seconds: dict[Kind, list[float]] = {
        "F": [stage.forward_s for stage in stages],
        "B": [stage.backward_s for stage in stages],
        "W": [stage.weight_gradient_s for stage in stages],
    }
    if name == "zero-bubble":
        seconds["B"] = [stage.backward_s - stage.weight_gradient_s for stage in stages]
    starts, ends = _run(orders, seconds, transfer_s if pipeline_size > 1 else 0.0)

    makespan = max(rank_ends[-1] for rank_ends in ends)
    busy = [sum(seconds[op.kind][op.stage] for op in order) for order in orders]
    kept_until: Kind = "W" if name == "zero-bubble" else "B"
    peaks = [_peaks(order, stages, kept_until) for order in orders]
    return Timeline(
        pipeline_ranks=[rank for rank, order in enumerate(orders) for _ in order],
        stages=[op.stage for order in orders for op in order],
        microbatches=[op.microbatch for order in orders for op in order],
        kinds=[op.kind for order in orders for op in order],
        starts_s=[start for rank_starts in starts for start in rank_starts],
        ends_s=[end for rank_ends in ends for end in rank_ends],
        makespan_s=makespan,
        idle_s=tuple(makespan - rank_busy for rank_busy in busy),
        peak_in_flight=tuple(count for count, _ in peaks),
        peak_kept_bytes=tuple(kept for _, kept in peaks),
        transfer_s=tuple(
            transfer_s * sum(_leaves(op, len(stages), pipeline_size) for op in order) for order in orders
        ),
    )


def _run(
    orders: list[list[Op]], seconds: dict[Kind, list[float]], transfer_s: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Start and end of each pass, rank by rank.

    A rank runs until the input of its next pass is not there; the pass that makes this input wakes it up.
    """
    last_stage = len(seconds["F"]) - 1
    starts: list[list[float]] = [[] for _ in orders]
    ends: list[list[float]] = [[] for _ in orders]
    arrived: dict[tuple[Kind, int, int], float] = {}
    asleep: dict[tuple[Kind, int, int], int] = {}
    awake = list(range(len(orders)))
    while awake:
        rank = awake.pop()
        order, rank_starts, rank_ends = orders[rank], starts[rank], ends[rank]
        now = rank_ends[-1] if rank_ends else 0.0
        for position in range(len(rank_ends), len(order)):
            kind, stage, microbatch = order[position]
            if (kind == "F" and stage) or (kind == "B" and stage < last_stage):
                arrival = arrived.pop((kind, stage, microbatch), None)
                if arrival is None:
                    asleep[kind, stage, microbatch] = rank
                    break
                now = max(now, arrival)
            rank_starts.append(now)
            now += seconds[kind][stage]
            rank_ends.append(now)
            if kind == "W":
                continue
            receiver = (kind, stage + 1 if kind == "F" else stage - 1, microbatch)
            arrived[receiver] = now + transfer_s
            if receiver in asleep:
                awake.append(asleep.pop(receiver))
    assert not asleep, "each pass has its input at some time"
    return starts, ends


def _peaks(order: list[Op], stages: Sequence[StageTimes], kept_until: Kind) -> tuple[int, float]:
    """The most forward passes whose activations are kept at once, and the most bytes of such."""
    count = most = 0
    kept = peak = 0.0
    for op in order:
        if op.kind == "F":
            count += 1
            kept += stages[op.stage].kept_bytes
            most, peak = max(most, count), max(peak, kept)
        elif op.kind == kept_until:
            count -= 1
            kept -= stages[op.stage].kept_bytes
    return most, peak


def _leaves(op: Op, num_stages: int, pipeline_size: int) -> bool:
    """Whether the rank sends what the pass makes to another one."""
    if pipeline_size == 1 or op.kind == "W":
        return False
    return op.stage < num_stages - 1 if op.kind == "F" else op.stage > 0
