"""How many microbatches of each of its stages a rank keeps at once."""

from __future__ import annotations

from functools import cache

from megatron_moe.plan.schedules.orders import ScheduleName, order_of

_ROUNDS = 4


@cache
def peaks(
    name: ScheduleName, rank: int, pipeline_size: int, chunks: int, num_microbatches: int
) -> tuple[tuple[int, ...], ...]:
    """The microbatches in flight of each chunk, at the moments of which no other has as many of every chunk.

    One of these moments is the one with most bytes, whatever a chunk keeps of a microbatch.
    """
    if name == "1f1b":
        return ((min(pipeline_size - rank, num_microbatches),),)
    counts = [0] * chunks
    moments = set()
    was_forward = False
    # Warm-up takes less than two rounds of PP microbatches, and then each round is as the one before.
    fewer = min(num_microbatches, _ROUNDS * pipeline_size)
    for op in order_of(name, rank, pipeline_size, chunks, fewer):
        if was_forward and op.kind == "B":
            moments.add(tuple(counts))
        was_forward = op.kind == "F"
        counts[op.stage // pipeline_size] += 1 if was_forward else -1
    return tuple(
        sorted(
            moment
            for moment in moments
            if not any(
                other != moment and all(a >= b for a, b in zip(other, moment, strict=True))
                for other in moments
            )
        )
    )
