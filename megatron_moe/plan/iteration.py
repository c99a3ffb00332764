"""An iteration of a planned experiment pass by pass, for pictures, traces and the comparison of schedules."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.assembly import assemble
from megatron_moe.plan.forecasting import stage_costs, stage_times
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.profile import profile_of
from megatron_moe.plan.schedules import ScheduleName, StageTimes, Timeline, simulate
from megatron_moe.plan.times.cluster import Cluster


@dataclass(frozen=True)
class Iteration:
    """What the forecast was made from.

    Attributes:
        times: of each stage.
        recompute_s: of each stage, the part of its backward pass in which it computes again.
        transfer_s: sending one microbatch to the next stage.
        timeline: of the schedule that the plan runs.
    """

    times: tuple[StageTimes, ...]
    recompute_s: tuple[float, ...]
    transfer_s: float
    timeline: Timeline


def iteration_of(experiment: Experiment, plan: Plan) -> Iteration:
    """The iteration of a filled experiment and its plan."""
    units = assemble(experiment, plan.layout, Cluster.of(experiment), profile_of(experiment))
    costs = stage_costs(experiment, plan.stages, units)
    times = stage_times(costs)
    name: ScheduleName = "interleaved" if plan.layout.virtual_pipeline_model_parallel_size > 1 else "1f1b"
    pipeline_size = plan.layout.pipeline_model_parallel_size
    return Iteration(
        times=tuple(times),
        recompute_s=tuple(cost.recompute_s for cost in costs),
        transfer_s=units.transfer_s,
        timeline=simulate(name, times, pipeline_size, plan.num_microbatches, units.transfer_s),
    )
