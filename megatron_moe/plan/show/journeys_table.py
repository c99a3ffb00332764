"""What `plan` says of the way of tokens to their experts."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from megatron_moe.plan.journeys import Journey
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.show.tables import print_table
from megatron_moe.plan.wording import count, size


def fold(layout: Layout) -> str:
    """Over which ranks the experts lie, and how far tokens travel to them."""
    together = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    if together == 1:
        return "Every rank holds all experts: no token travels."
    span = {name: ranks for name, ranks in layout.expert_span.items() if ranks > 1}
    axes = " x ".join(f"{name} {ranks}" for name, ranks in span.items())
    over = f"{'ETP x EP' if layout.expert_tensor_parallel_size > 1 else 'EP'} {together}"
    if layout.experts_cross_replicas:
        return f"{over} lies over {axes}: tokens travel between data-parallel replicas."
    is_edp = span == {"TP": together} and layout.expert_tensor_parallel_size == 1
    name = " (Expert Data Parallelism)" if is_edp else ""
    return f"{over} lies over {axes}{name}: no token leaves its data-parallel replica."


_COLUMNS: dict[str, Callable[[Journey], str]] = {
    "dispatcher": lambda journey: journey.dispatcher,
    "rows": lambda journey: count(journey.rows),
    "elements": lambda journey: count(journey.elements),
    "bytes": lambda journey: size(journey.bytes),
    "between nodes": lambda journey: size(journey.bytes_between_nodes or 0),
}


def print_journeys(console: Console, plan: Plan) -> None:
    """One row for each dispatcher; nothing where no token travels."""
    dispatch = plan.dispatch
    if dispatch is None or not dispatch.journeys:
        return
    titles = dict(_COLUMNS)
    if dispatch.journeys[0].bytes_between_nodes is None:
        del titles["between nodes"]
    columns = {title: [cell(journey) for journey in dispatch.journeys] for title, cell in titles.items()}
    columns[""] = ["taken" if way.dispatcher == dispatch.dispatcher else "" for way in dispatch.journeys]
    precision = {2: "bf16", 4: "fp32"}[dispatch.element_size]
    console.print(f"[bold]A token's way to its experts and back[/] in an MoE layer, forward, in {precision}")
    print_table(console, columns, left=["dispatcher", ""])
    if dispatch.dispatcher == "flex":
        console.print(
            "The kernels of the dispatcher flex are not counted; they send about as `deduplicated`.\n"
        )
