"""`megatron-moe plan`: the plan as tables, or as JSON, and if wanted as a picture and a trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Protocol

from rich.console import Console

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.plan import devices
from megatron_moe.plan.iteration import Iteration, iteration_of
from megatron_moe.plan.plan import Plan, make
from megatron_moe.plan.show.forecast_table import print_forecast
from megatron_moe.plan.show.journeys_table import print_journeys
from megatron_moe.plan.show.layout_table import print_experts, print_groups, print_layout
from megatron_moe.plan.show.output_file import write_whole
from megatron_moe.plan.show.schedules_table import print_schedules
from megatron_moe.plan.show.stage_table import print_memory, print_stages
from megatron_moe.plan.show.tables import console_of_tables
from megatron_moe.plan.trace import chrome_trace, planned_events
from megatron_moe.plan.wording import count

_PICTURES = (".png", ".svg", ".pdf")


class Loaded(Protocol):
    """What `config` hands over: at least the filled experiment."""

    @property
    def experiment(self) -> Experiment: ...


def run(
    loaded: Loaded,
    gpus: int | None,
    as_json: bool,
    *,
    plot: Path | None = None,
    trace: Path | None = None,
    schedules: bool = False,
) -> None:
    """Print the plan to stdout.

    Args:
        gpus: the number of ranks that the user asked the plan for, if any.
        plot, trace: files to write.
        schedules: whether other pipeline schedules are compared.

    Raises InputError where a file cannot be written, and RunError where its disk is full.
    """
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise InputError(
            f"--plot {plot}: the name must end with {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}"
        )
    experiment = loaded.experiment
    plan = make(experiment)
    iteration = iteration_of(experiment, plan) if plot or trace or schedules else None
    if plot is not None and iteration is not None:
        _plot(plot, experiment, plan, iteration)
    if trace is not None and iteration is not None:
        _trace(trace, experiment.name, plan, iteration)
    if as_json:
        sys.stdout.write(plan.to_json())
        return
    console = console_of_tables()
    _print_model(console, experiment.name, plan)
    print_layout(console, plan, gpus)
    print_groups(console, plan)
    if plan.num_moe_experts:
        print_experts(console, plan)
        print_journeys(console, plan)
    print_stages(console, experiment, plan)
    print_memory(console, experiment, plan)
    if schedules and iteration is not None:
        print_schedules(console, plan, iteration)
    print_forecast(console, experiment, plan)
    for name, file in (("Picture", plot), ("Trace", trace)):
        if file is not None:
            console.print(f"{name}: {file}", soft_wrap=True, markup=False)


def _print_model(console: Console, name: str, plan: Plan) -> None:
    total, active = plan.parameters.total, plan.parameters.active
    detail = f", {count(active)} of them active for a token" if active < total else ""
    console.print(f"[bold]{name}[/]: {count(total)} parameters{detail}\n")


def _plot(file: Path, experiment: Experiment, plan: Plan, iteration: Iteration) -> None:
    from megatron_moe.plan.show.drawing import picture

    form = file.suffix.lower().removeprefix(".")
    names = experiment.name, devices.noun(experiment)
    write_whole("--plot", file, picture(*names, plan, iteration.timeline, iteration.recompute_s, form))


def _trace(file: Path, name: str, plan: Plan, iteration: Iteration) -> None:
    events = planned_events(iteration.timeline, plan.forecast, iteration.recompute_s, iteration.transfer_s)
    record = chrome_trace(events, origin="planned", details={"name": name, "source": plan.forecast.source})
    write_whole("--trace", file, json.dumps(record).encode())
