"""What `plan` says of ranks: their number on each axis, which form groups, and who holds which experts."""

from __future__ import annotations

from rich.console import Console

from megatron_moe.plan.layout import GroupKind
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.show.journeys_table import fold
from megatron_moe.plan.show.tables import print_table
from megatron_moe.plan.wording import group_list, number_list, plural

_SHOWN_EXPERT_ROWS = 5
_RANKS_WIDTH = 43

_AXES: dict[GroupKind, str] = {"tp": "TP", "cp": "CP", "dp": "DP", "pp": "PP"}
_EXPERT_AXES: dict[GroupKind, str] = {
    "expert_tp": "ETP",
    "ep": "EP",
    "tp_ep": "ETP x EP",
    "expert_dp": "expert replicas",
}


def print_layout(console: Console, plan: Plan, gpus: int | None) -> None:
    """Sizes of the axes. `gpus`: the number of ranks that the user asked the plan for, if any."""
    layout = plan.layout
    pipeline = f"PP {layout.pipeline_model_parallel_size}"
    if layout.virtual_pipeline_model_parallel_size > 1:
        pipeline += f" (VPP {layout.virtual_pipeline_model_parallel_size})"
    origin = " (--gpus)" if gpus is not None else ""
    console.print(
        f"[bold]{plural(layout.world_size, 'rank')}[/]{origin} = TP {layout.tensor_model_parallel_size} x "
        f"{pipeline} x CP {layout.context_parallel_size} x DP {layout.data_parallel_size}"
    )
    if plan.num_moe_experts and layout.world_size > 1:
        console.print(
            f"For the experts the same ranks are ETP {layout.expert_tensor_parallel_size} x "
            f"EP {layout.expert_model_parallel_size} x PP {layout.pipeline_model_parallel_size} x "
            f"{plural(layout.expert_data_parallel_size, 'replica')}"
        )
        console.print(fold(layout))
    console.print()


def print_groups(console: Console, plan: Plan) -> None:
    """One row for each axis with more than one rank; axes over the same ranks share a row."""
    axes = {**_AXES, **_EXPERT_AXES} if plan.num_moe_experts else _AXES
    names: dict[tuple[tuple[int, ...], ...], str] = {}
    for kind, name in axes.items():
        groups = tuple(map(tuple, plan.layout.groups(kind)))
        if len(groups[0]) == 1 or (kind == "tp_ep" and groups in names):
            continue
        names[groups] = f"{names[groups]}, {name}" if groups in names else name
    if not names:
        return
    columns = {
        "groups of ranks": list(names.values()),
        "number": [f"{len(groups):,}" for groups in names],
        "size": [f"{len(groups[0]):,}" for groups in names],
        "ranks": [group_list(groups, _RANKS_WIDTH) for groups in names],
    }
    print_table(console, columns, left=["groups of ranks", "ranks"], folded=["ranks"])


def print_experts(console: Console, plan: Plan) -> None:
    """One row for each part of the experts; of many parts the first ones and the last. Nothing where every
    rank holds all."""
    layout = plan.layout
    if layout.expert_model_parallel_size * layout.expert_tensor_parallel_size == 1:
        return
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
    where = f" of pipeline rank {stage}" if layout.pipeline_model_parallel_size > 1 else ""
    experts = plural(plan.num_moe_experts, "expert")
    console.print(f"[bold]Who holds which of the {experts} of an MoE layer[/]{where}")
    titles = ("experts", "held by", "ranks")
    columns = dict(zip(titles, map(list, zip(*rows, strict=True)), strict=True))
    print_table(console, columns, left=["experts", "ranks"], folded=["ranks"])
    if layout.expert_tensor_parallel_size > 1:
        parts = layout.expert_tensor_parallel_size
        console.print(f"Each expert is cut over {parts} ranks (ETP): each holds a part of it.\n")
