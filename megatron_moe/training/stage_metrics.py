"""What each pipeline rank's stages took in a step: time a microbatch, waiting, and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_moe.engine.stopwatch import BACKWARD, FORWARD, SCHEDULE, Span
from megatron_moe.plan.layout import Layout


def stage_metrics(
    layout: Layout,
    spans: Sequence[Span] | None,
    peak_bytes: float,
    num_microbatches: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Lists with one entry a pipeline rank: of times the mean over its ranks, so that they add up, of memory
    the most. A collective over the world.

    Args:
        spans: what this rank did in the step; None where its passes cannot be told apart.
        peak_bytes: the most memory of this rank; NaN where it is not known.
    """
    mine = torch.tensor([*_durations(spans), peak_bytes], dtype=torch.float64, device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    table = torch.stack(of_ranks).cpu()
    where = torch.tensor([layout.coordinates(rank).pp for rank in range(len(of_ranks))])
    held = [table[where == rank] for rank in range(layout.pipeline_model_parallel_size)]
    # Every rank waits for the last backward pass of all.
    length = float(table[:, 2].max())
    milliseconds = 1000 / num_microbatches
    return {
        "stage/forward_ms": [milliseconds * float(part[:, 0].mean()) for part in held],
        "stage/backward_ms": [milliseconds * float(part[:, 1].mean()) for part in held],
        "stage/idle_ms": [1000 * (length - float(part[:, :2].sum(1).mean())) for part in held],
        "stage/peak_memory_gib": [float(part[:, 3].max()) / 2**30 for part in held],
    }


def _durations(spans: Sequence[Span] | None) -> tuple[float, float, float]:
    """Seconds of a step on this rank: of all forward passes, of all backward passes, and from the beginning
    of the schedule to the end of the last backward pass."""
    if spans is None:
        return (float("nan"),) * 3
    forward = sum(span.duration_s for span in spans if span.name == FORWARD)
    backward = sum(span.duration_s for span in spans if span.name == BACKWARD)
    begin = next(span.begin_s for span in spans if span.name == SCHEDULE)
    end = max(span.end_s for span in spans if span.name == BACKWARD)
    return forward, backward, end - begin
