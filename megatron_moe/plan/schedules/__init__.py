"""Pipeline schedules, simulated: which pass runs on which rank, when, and what waits."""

from megatron_moe.plan.schedules.long_iterations import extent, simulate
from megatron_moe.plan.schedules.orders import Kind, ScheduleName
from megatron_moe.plan.schedules.simulation import StageTimes, simulate_whole
from megatron_moe.plan.schedules.timeline import Extent, LeftOut, Timeline

__all__ = [
    "Extent",
    "Kind",
    "LeftOut",
    "ScheduleName",
    "StageTimes",
    "Timeline",
    "extent",
    "simulate",
    "simulate_whole",
]
