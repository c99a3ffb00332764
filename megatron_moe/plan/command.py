"""`megatron-moe plan`: the plan as tables, or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs import FORMULA, StageCosts
from megatron_moe.plan.journeys_table import fold, print_journeys
from megatron_moe.plan.layout import GroupKind
from megatron_moe.plan.plan import Plan, make
from megatron_moe.plan.stages import Stage
from megatron_moe.plan.wording import count, flops, group_list, number_list, plural

_SHOWN_EXPERT_ROWS = 8
_RANKS_WIDTH = 43
_LEAST_WIDTH = 80

_AXES: dict[GroupKind, str] = {"tp": "TP", "cp": "CP", "dp": "DP", "pp": "PP"}
_EXPERT_AXES: dict[GroupKind, str] = {"expert_tp": "ETP", "ep": "EP", "expert_dp": "expert replicas"}
_PRODUCTS: dict[GroupKind, str] = {
    "tp_cp": "TP x CP",
    "dp_cp": "DP x CP",
    "tp_dp_cp": "TP x DP x CP",
    "tp_ep": "ETP x EP",
    "embedding": "first, last stage",
}


class Loaded(Protocol):
    """What `config` hands over: at least the filled experiment."""

    @property
    def experiment(self) -> Experiment: ...


def run(loaded: Loaded, gpus: int | None, as_json: bool) -> None:
    """Print the plan to stdout. `gpus`: the number of ranks that the user asked the plan for, if any."""
    plan = make(loaded.experiment)
    if as_json:
        sys.stdout.write(plan.to_json())
        return
    console = Console(highlight=False)
    # In a narrower window lines break, but no number is cut.
    console.width = max(console.width, _LEAST_WIDTH)
    _print_model(console, loaded.experiment.name, plan)
    _print_layout(console, plan, gpus)
    if plan.num_moe_experts:
        _print_experts(console, plan)
        print_journeys(console, plan)
    _print_stages(console, plan)


def _print_model(console: Console, name: str, plan: Plan) -> None:
    total, active = plan.parameters.total, plan.parameters.active
    detail = f", {count(active)} of them active for a token" if active < total else ""
    console.print(f"[bold]{name}[/]: {count(total)} parameters{detail}")
    console.print(f"Training takes {flops(plan.flops_per_token)} a token: {FORMULA}.\n")


def _print_layout(console: Console, plan: Plan, gpus: int | None) -> None:
    layout = plan.layout
    pipeline = f"PP {layout.pipeline_model_parallel_size}"
    if layout.virtual_pipeline_model_parallel_size > 1:
        pipeline += f" (VPP {layout.virtual_pipeline_model_parallel_size})"
    origin = " (--gpus)" if gpus is not None else ""
    console.print(
        f"[bold]{plural(layout.world_size, 'rank')}[/]{origin} = TP {layout.tensor_model_parallel_size} x "
        f"{pipeline} x CP {layout.context_parallel_size} x DP {layout.data_parallel_size}"
    )
    if plan.num_moe_experts:
        console.print(
            f"For the experts the same ranks are ETP {layout.expert_tensor_parallel_size} x "
            f"EP {layout.expert_model_parallel_size} x PP {layout.pipeline_model_parallel_size} x "
            f"{plural(layout.expert_data_parallel_size, 'replica')}"
        )
        console.print(fold(layout))
    console.print()
    if layout.world_size > 1:
        _print_groups(console, plan)


def _print_groups(console: Console, plan: Plan) -> None:
    """One row for each kind of group with more than one member; axes over the same ranks share a row."""
    axes = {**_AXES, **_EXPERT_AXES} if plan.num_moe_experts else _AXES
    names: dict[tuple[tuple[int, ...], ...], str] = {}
    for kind, name in (axes | _PRODUCTS).items():
        groups = tuple(map(tuple, plan.layout.groups(kind)))
        if len(groups[0]) == 1 or (kind in _PRODUCTS and groups in names):
            continue
        names[groups] = f"{names[groups]}, {name}" if groups in names else name
    table = _table()
    table.add_column("kind", no_wrap=True)
    table.add_column("groups", justify="right")
    table.add_column("size", justify="right")
    table.add_column("ranks")
    for groups, name in names.items():
        table.add_row(name, f"{len(groups):,}", f"{len(groups[0]):,}", group_list(groups, _RANKS_WIDTH))
    console.print("[bold]Groups of ranks[/]")
    console.print(table)


def _print_experts(console: Console, plan: Plan) -> None:
    """One row for each part of the experts; of many parts the first ones and the last."""
    layout = plan.layout
    # The layers of a pipeline rank lie on its ranks only.
    stage = next((stage.pipeline_rank for stage in plan.stages if stage.moe_layers), 0)
    holders: dict[range, list[int]] = {}
    for rank in range(layout.world_size):
        if layout.coordinates(rank).pp == stage:
            holders.setdefault(plan.experts_on(rank), []).append(rank)
    rows = [
        (number_list(experts), plural(len(ranks), "rank"), number_list(ranks))
        for experts, ranks in holders.items()
    ]
    if len(rows) > _SHOWN_EXPERT_ROWS:
        rows = [*rows[: _SHOWN_EXPERT_ROWS - 2], ("...", "...", "..."), rows[-1]]
    table = _table()
    table.add_column("experts", no_wrap=True)
    table.add_column("held by", no_wrap=True, justify="right")
    table.add_column("ranks")
    for row in rows:
        table.add_row(*row)
    where = f" of pipeline rank {stage}" if layout.pipeline_model_parallel_size > 1 else ""
    experts = plural(plan.num_moe_experts, "expert")
    console.print(f"[bold]Who holds which of the {experts} of an MoE layer[/]{where}")
    console.print(table)
    if layout.expert_tensor_parallel_size > 1:
        parts = layout.expert_tensor_parallel_size
        console.print(f"Each expert is cut over {parts} ranks (ETP): each holds a part of it.\n")


_STAGE_COLUMNS: dict[str, Callable[[Stage, StageCosts], str]] = {
    "stage": lambda stage, costs: str(stage.index),
    "PP\nrank": lambda stage, costs: str(stage.pipeline_rank),
    "chunk": lambda stage, costs: str(stage.chunk),
    "layers": lambda stage, costs: number_list(stage.layers) or "none",
    "count": lambda stage, costs: str(len(stage.layers)),
    "MoE": lambda stage, costs: str(len(stage.moe_layers)),
    "re-\ncomputed": lambda stage, costs: "parts" if stage.recomputed_modules else str(stage.recomputed),
    "parameters\na rank": lambda stage, costs: count(costs.parameters_per_rank),
    "also": lambda stage, costs: ", ".join(["embedding"] * stage.has_embedding + ["loss"] * stage.has_loss),
}


def _print_stages(console: Console, plan: Plan) -> None:
    columns = dict(_STAGE_COLUMNS)
    if plan.layout.virtual_pipeline_model_parallel_size == 1:
        del columns["chunk"]
    table = _table()
    for title in columns:
        table.add_column(title, justify="left" if title in ("layers", "also") else "right", no_wrap=True)
    for stage, costs in zip(plan.stages, plan.stage_costs, strict=True):
        table.add_row(*(cell(stage, costs) for cell in columns.values()))
    console.print("[bold]Pipeline stages[/] in the order in which a token passes them; layers count from 0")
    console.print(table)
    modules = dict.fromkeys(name for stage in plan.stages for name in stage.recomputed_modules)
    if modules:
        console.print(f"Parts that the backward pass computes again in each layer: {', '.join(modules)}.")


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
