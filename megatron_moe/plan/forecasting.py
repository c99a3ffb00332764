"""From stages and the costs of their pieces to the forecast: what fits, and how long an iteration takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.batch_ramp import batches, num_microbatches
from megatron_moe.plan.costs.parameters import flops_per_token
from megatron_moe.plan.forecast import Forecast, MemoryForecast, RankForecast
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.limits import limits_of
from megatron_moe.plan.profile import Profile
from megatron_moe.plan.schedules.long_iterations import simulate
from megatron_moe.plan.schedules.orders import ScheduleName
from megatron_moe.plan.schedules.simulation import StageTimes
from megatron_moe.plan.schedules.timeline import Timeline
from megatron_moe.plan.stage_units import StageCost, stage_cost
from megatron_moe.plan.stages import Stage
from megatron_moe.plan.times import timing
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.units import Units

_DAY_S = 24 * 3600


def stage_costs(experiment: Experiment, stages: Sequence[Stage], units: Units) -> list[StageCost]:
    """What each stage costs on one of its ranks."""
    return [
        stage_cost(
            units,
            range(stage.layers[0], stage.layers[-1] + 1) if stage.layers else range(0),
            method=experiment.recompute.method,
            count=stage.recompute_num_layers,
            is_first=stage.has_embedding,
            is_last=stage.has_loss,
            has_mtp=stage.num_mtp_layers > 0,
        )
        for stage in stages
    ]


def stage_times(costs: Sequence[StageCost]) -> list[StageTimes]:
    """What the simulation of a schedule takes of them."""
    return [
        StageTimes(cost.forward_s, cost.backward_s, cost.weight_gradient_s, cost.kept_bytes) for cost in costs
    ]


def foretell(
    experiment: Experiment,
    layout: Layout,
    stages: Sequence[Stage],
    units: Units,
    cluster: Cluster,
    measured: Profile | None = None,
) -> Forecast:
    """The forecast of a filled experiment whose stages are known.

    Args:
        measured: whose time of the update takes the place of the model's.
    """
    costs = stage_costs(experiment, stages, units)
    pipeline_size, microbatches = layout.pipeline_model_parallel_size, num_microbatches(experiment)
    name: ScheduleName = "interleaved" if layout.virtual_pipeline_model_parallel_size > 1 else "1f1b"
    timeline = simulate(name, stage_times(costs), pipeline_size, microbatches, units.transfer_s)
    of_rank = [costs[rank::pipeline_size] for rank in range(pipeline_size)]
    ranks = tuple(_rank(rank, of_rank[rank], timeline, cluster) for rank in range(pipeline_size))
    after = [
        _after(
            experiment,
            layout,
            cluster,
            [stage for stage in stages if stage.pipeline_rank == rank.pipeline_rank],
            rank,
            measured,
        )
        for rank in ranks
    ]
    gradient_s, optimizer_s = max(after, key=sum)
    iteration_s = timeline.makespan_s + gradient_s + optimizer_s
    microbatch_s = max(rank.forward_s + rank.backward_s for rank in ranks)
    tokens = experiment.training.global_batch_size * experiment.training.seq_length
    flops = flops_per_token(experiment)
    speed = tokens / iteration_s / layout.world_size
    forecast = Forecast(
        ranks=ranks,
        pipeline_s=timeline.makespan_s,
        bubble=timeline.bubble,
        transfer_s=2 * (len(stages) - 1) * units.transfer_s,
        exposed_all_to_all_s=microbatches * max(sum(cost.exposed_s for cost in held) for held in of_rank),
        hidden_all_to_all_s=microbatches * max(sum(cost.hidden_s for cost in held) for held in of_rank),
        gradient_s=gradient_s,
        optimizer_s=optimizer_s,
        iteration_s=iteration_s,
        model_flops_per_token=flops,
        tokens_per_second_per_gpu=speed,
        tflops_per_gpu=speed * flops / 1e12,
        mfu=None if cluster.peak_flops is None else speed * flops / cluster.peak_flops,
        days=_run_s(experiment, iteration_s, microbatch_s) / _DAY_S,
        limits=(),
        source=units.source,
    )
    launched_s = microbatches * max(
        sum(_launched_s(units, stage, cluster) for stage in stages if stage.pipeline_rank == rank)
        for rank in range(pipeline_size)
    )
    return replace(forecast, limits=limits_of(forecast, microbatches, launched_s))


def _run_s(experiment: Experiment, iteration_s: float, microbatch_s: float) -> float:
    """All iterations. While the batch grows, each lacks microbatches at the pace of the slowest rank."""
    whole, microbatches = experiment.training.global_batch_size, num_microbatches(experiment)
    return sum(
        steps * (iteration_s - (1 - size / whole) * microbatches * microbatch_s)
        for steps, size in batches(experiment.training)
    )


def _launched_s(units: Units, stage: Stage, cluster: Cluster) -> float:
    """Of a microbatch's passes through a stage, those that take as long as the host takes to launch them."""
    seconds = 0.0
    for number in stage.layers:
        layer = units.layers[number]
        takes = (layer.times.forward_s, layer.times.backward_s)
        bounds = timing.launch_s(cluster, layer.kind)
        seconds += sum(bound for taken, bound in zip(takes, bounds, strict=True) if bound and taken == bound)
    return seconds


def _after(
    experiment: Experiment,
    layout: Layout,
    cluster: Cluster,
    stages: Sequence[Stage],
    rank: RankForecast,
    measured: Profile | None,
) -> tuple[float, float]:
    """Seconds of gradients and gathered weights, and of the update, of one pipeline rank."""
    gradient_s, optimizer_s = timing.after_pipeline(
        experiment, layout, cluster, stages, rank.forward_s, rank.backward_s
    )
    if measured is not None:
        count = timing.updated_parameters(experiment, layout, cluster, timing.pieces_on(stages))
        optimizer_s = count * measured.optimizer_s_per_parameter
    return gradient_s, optimizer_s


def _rank(rank: int, held: Sequence[StageCost], timeline: Timeline, cluster: Cluster) -> RankForecast:
    static = [cost.memory for cost in held]
    return RankForecast(
        pipeline_rank=rank,
        in_flight=timeline.peak_in_flight[rank],
        memory=MemoryForecast(
            weights=sum(part.weights for part in static),
            gradients=sum(part.gradients for part in static),
            optimizer=sum(part.optimizer for part in static),
            activations=timeline.peak_kept_bytes[rank],
            working=max(cost.working_bytes for cost in held),
            reserved=cluster.reserved_bytes,
            limit=cluster.memory_bytes,
        ),
        forward_s=sum(cost.forward_s for cost in held),
        backward_s=sum(cost.backward_s for cost in held),
        idle_s=timeline.idle_s[rank],
    )
