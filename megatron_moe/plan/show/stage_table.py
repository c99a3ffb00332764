"""What `plan` says of each pipeline rank: what it holds, how long that takes, and what lies in its memory."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from megatron_moe.config.layout_string import AUTO, layers_are_placed
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.advice import advice
from megatron_moe.plan.forecast import MemoryForecast
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.show.tables import print_table
from megatron_moe.plan.stages import Stage
from megatron_moe.plan.wording import BYTES, SECONDS, count, in_one_unit, number_list, percent, plural
from megatron_moe.plan.wording import memory as memory_of

_ROUNDING = 1e-6
_SHOWN = 5e-4
"""Smaller gaps have no digit that is printed."""
_SHOWN_CHUNKS = 4
_TOO_MUCH = "[bold red]{} ![/]"


def print_stages(console: Console, experiment: Experiment, plan: Plan) -> None:
    """One row for each pipeline rank, over all its chunks."""
    ranks = plan.forecast.ranks
    held = [[stage for stage in plan.stages if stage.pipeline_rank == rank.pipeline_rank] for rank in ranks]
    parameters = [0] * len(ranks)
    for stage, cost in zip(plan.stages, plan.stage_costs, strict=True):
        parameters[stage.pipeline_rank] += cost.parameters_per_rank
    times = [time for rank in ranks for time in (rank.forward_s, rank.backward_s)]
    unit, seconds = in_one_unit(times, SECONDS, digits=4)
    columns = {
        "PP\nrank": [str(rank.pipeline_rank) for rank in ranks],
        "holds": [_holds(stages) for stages in held],
        "layers": [str(sum(len(stage.layers) for stage in stages)) for stages in held],
        "MoE": [str(sum(len(stage.moe_layers) for stage in stages)) for stages in held],
        "re-\ncomputed": [_recomputed(stages) for stages in held],
        "param-\neters": [count(number) for number in parameters],
        f"forward\n{unit}": [seconds(rank.forward_s) for rank in ranks],
        f"backward\n{unit}": [seconds(rank.backward_s) for rank in ranks],
        "idle\n%": [f"{100 * rank.idle_s / plan.forecast.pipeline_s:.1f}" for rank in ranks],
    }
    if columns["MoE"] == columns["layers"] or not plan.num_moe_experts:
        del columns["MoE"]
    if set(columns["re-\ncomputed"]) == {"0"}:
        del columns["re-\ncomputed"]
    if len(ranks) == 1:
        del columns["PP\nrank"], columns["idle\n%"]
    console.print(f"[bold]{_title(plan)}[/]")
    planned = ["layers"] * layers_are_placed(experiment)
    planned += ["recomputation"] * (experiment.recompute.layers_per_stage == AUTO)
    if planned:
        console.print(f"Placed by the planner (auto): {' and '.join(planned)}{_proof(plan)}")
    print_table(console, columns, left=["holds"], folded=["holds"])
    modules = dict.fromkeys(name for stage in plan.stages for name in stage.recomputed_modules)
    if modules:
        console.print(f"The backward pass computes again in each layer: {', '.join(modules)}.\n")


def print_memory(console: Console, experiment: Experiment, plan: Plan) -> None:
    """One row for each pipeline rank, by part; what does not fit is marked."""
    ranks = plan.forecast.ranks
    memories = [rank.memory for rank in ranks]
    limit = memories[0].limit
    unit, number = in_one_unit([memory.total for memory in memories], BYTES)
    columns = {
        "PP\nrank": [str(rank.pipeline_rank) for rank in ranks],
        "in\nflight": [str(rank.in_flight) for rank in ranks],
        "weights": [number(memory.weights) for memory in memories],
        "gra-\ndients": [number(memory.gradients) for memory in memories],
        "opti-\nmizer": [number(memory.optimizer) for memory in memories],
        "acti-\nvations": [number(memory.activations) for memory in memories],
        "work-\ning": [number(memory.working) for memory in memories],
        "re-\nserved": [number(memory.reserved) for memory in memories],
        "total": [number(memory.total) for memory in memories],
        "free": [_free(memory, number(memory.headroom or 0.0)) for memory in memories],
    }
    if limit is None:
        del columns["free"]
    if len(ranks) == 1:
        del columns["PP\nrank"], columns["in\nflight"]
    of_limit = "" if limit is None else f", of {memory_of(limit)}"
    console.print(f"[bold]Memory of each rank[/] in {unit}{of_limit}")
    print_table(console, columns)
    if limit is None:
        console.print("How much there is, is not known: launch.cluster.memory_gib says it.\n")
    if any((memory.headroom or 0) < 0 for memory in memories):
        console.print("[bold red]! Does not fit.[/]", escape(advice(experiment)) + "\n")


def _proof(plan: Plan) -> str:
    """How good the placement is."""
    if plan.placement_gap is None or plan.layout.num_stages == 1:
        return ""
    if plan.placement_gap < _ROUNDING:
        return "; none that fits is faster"
    if plan.placement_gap < _SHOWN:
        return f"; none is {percent(2 * _SHOWN)} faster"
    return f"; one that is up to {100 * plan.placement_gap:.1f} % faster may exist"


def _title(plan: Plan) -> str:
    layers = plural(sum(len(stage.layers) for stage in plan.stages), "layer")
    chunks = plan.layout.virtual_pipeline_model_parallel_size
    schedule = f"interleaved 1F1B (VPP {chunks})" if chunks > 1 else "1F1B"
    stages = plural(plan.layout.num_stages, "stage") + (f", {schedule}" if plan.layout.num_stages > 1 else "")
    microbatches = f"{plan.num_microbatches:,} microbatch{'es' * (plan.num_microbatches != 1)}"
    return f"{layers} on {stages}, {microbatches} an iteration"


def _holds(stages: Sequence[Stage]) -> str:
    """`embedding, 0-3`; of a rank with several chunks `0-1 | 24-25`."""
    texts = [_layers(stage) for stage in stages]
    if len(texts) > _SHOWN_CHUNKS:
        texts = [*texts[:2], "...", texts[-1]]
    return " | ".join(texts)


def _layers(stage: Stage) -> str:
    parts = ["embedding"] * stage.has_embedding + [number_list(stage.layers)] * bool(stage.layers)
    parts += ["MTP"] * (stage.num_mtp_layers > 0) + ["loss"] * stage.has_loss
    return ", ".join(parts) or "none"


def _recomputed(stages: Sequence[Stage]) -> str:
    if any(stage.recomputed_modules for stage in stages):
        return "parts"
    return str(sum(stage.recomputed for stage in stages))


def _free(memory: MemoryForecast, text: str) -> str:
    fits = memory.headroom is None or memory.headroom >= 0
    return text if fits else _TOO_MUCH.format(text)
