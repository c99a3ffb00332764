"""Pipeline schedules, simulated: which pass runs on which rank, when, and what waits."""

from megatron_moe.plan.schedules.orders import Kind, ScheduleName
from megatron_moe.plan.schedules.simulation import StageTimes, simulate
from megatron_moe.plan.schedules.timeline import Timeline

__all__ = ["Kind", "ScheduleName", "StageTimes", "Timeline", "simulate"]
