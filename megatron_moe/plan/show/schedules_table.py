"""`plan --schedules`: what other pipeline schedules would make of the same stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from megatron_moe.plan.iteration import Iteration
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.schedules import Extent, ScheduleName, StageTimes, extent
from megatron_moe.plan.show.tables import print_table
from megatron_moe.plan.wording import BYTES, SECONDS, in_one_unit, percent

_TITLES: dict[ScheduleName, str] = {
    "1f1b": "1F1B",
    "interleaved": "interleaved 1F1B",
    "gpipe": "GPipe",
    "zero-bubble": "zero-bubble (ZB-H1)",
}
_CHUNKS = 2
"""Of the interleaved schedule where the plan has one a rank."""


def print_schedules(console: Console, plan: Plan, iteration: Iteration) -> None:
    """One row for each schedule that can run the plan's microbatches."""
    found = dict(compared(plan, iteration))
    unit, seconds = in_one_unit([whole.makespan_s for whole in found.values()], SECONDS, digits=4)
    kept = [max(whole.peak_kept_bytes) for whole in found.values()]
    bytes_unit, size = in_one_unit(kept, BYTES, digits=4)
    taken = _TITLES["interleaved" if plan.layout.virtual_pipeline_model_parallel_size > 1 else "1f1b"]
    columns = {
        "schedule": list(found),
        f"pipeline\n{unit}": [seconds(whole.makespan_s) for whole in found.values()],
        "idle": [percent(whole.bubble) for whole in found.values()],
        f"most activations\n{bytes_unit}": list(map(size, kept)),
        "": ["planned" if name.startswith(taken) else "" for name in found],
    }
    console.print("[bold]Other schedules[/] of the same layers on the same ranks")
    print_table(console, columns, left=["schedule", ""])
    notes = ["`train` runs 1F1B and interleaved 1F1B."]
    pipeline_size = plan.layout.pipeline_model_parallel_size
    if plan.num_microbatches % pipeline_size:
        notes.append(f"Interleaved 1F1B needs microbatches in multiples of PP = {pipeline_size}.")
    console.print(" ".join(notes) + "\n")


def compared(plan: Plan, iteration: Iteration) -> Iterator[tuple[str, Extent]]:
    """Name and one iteration of each. Stages without chunks are cut in halves for the interleaved one."""
    pipeline_size, microbatches = plan.layout.pipeline_model_parallel_size, plan.num_microbatches
    chunks = plan.layout.virtual_pipeline_model_parallel_size
    whole = [_sum(iteration.times[rank::pipeline_size]) for rank in range(pipeline_size)]
    for name, title in _TITLES.items():
        stages: Sequence[StageTimes] = whole
        if name == "interleaved":
            if pipeline_size == 1 or microbatches % pipeline_size:
                continue
            stages = iteration.times if chunks > 1 else [_part(stage) for stage in whole] * _CHUNKS
            title += f", VPP {chunks if chunks > 1 else _CHUNKS}"
        yield title, extent(name, stages, pipeline_size, microbatches, iteration.transfer_s)


def _sum(stages: Sequence[StageTimes]) -> StageTimes:
    return StageTimes(
        forward_s=sum(stage.forward_s for stage in stages),
        backward_s=sum(stage.backward_s for stage in stages),
        weight_gradient_s=sum(stage.weight_gradient_s for stage in stages),
        kept_bytes=sum(stage.kept_bytes for stage in stages),
    )


def _part(stage: StageTimes) -> StageTimes:
    return StageTimes(
        forward_s=stage.forward_s / _CHUNKS,
        backward_s=stage.backward_s / _CHUNKS,
        weight_gradient_s=stage.weight_gradient_s / _CHUNKS,
        kept_bytes=stage.kept_bytes / _CHUNKS,
    )
