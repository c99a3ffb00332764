"""`megatron-moe plan --against`: the forecast of an experiment beside what a run of it measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.plan import Plan, make
from megatron_moe.plan.show.tables import console_of_tables, print_table
from megatron_moe.plan.wording import number, plural

_GIB = 2**30
_CLOSE = 0.05
"""Differences up to this are called small."""
_STAGE = ("stage/forward_ms", "stage/backward_ms", "stage/idle_ms", "stage/peak_memory_gib")


class Loaded(Protocol):
    """What `config` hands over: at least the filled experiment."""

    @property
    def experiment(self) -> Experiment: ...


@dataclass(frozen=True)
class Pair:
    """One number, foretold and measured.

    Attributes:
        measured: None where the run did not measure it.
        times: how often it counts in an iteration.
    """

    what: str
    rank: int
    unit: str
    foretold: float
    measured: float | None
    times: int = 1

    @property
    def difference(self) -> float | None:
        """By what part of the measured number the forecast is too high."""
        return self.foretold / self.measured - 1 if self.measured else None


@dataclass(frozen=True)
class Comparison:
    """One entry a pipeline rank; medians of the run's steps."""

    forward_ms: tuple[Pair, ...]
    backward_ms: tuple[Pair, ...]
    idle_ms: tuple[Pair, ...]
    memory_gib: tuple[Pair, ...]
    speed: Pair
    steps: int
    detailed_steps: int
    """Those of them that measured passes, idle time and memory."""

    @property
    def columns(self) -> dict[str, tuple[Pair, ...]]:
        return {
            "forward": self.forward_ms,
            "backward": self.backward_ms,
            "idle": self.idle_ms,
            "memory": self.memory_gib,
        }


def plan_of(run: Path) -> Plan:
    """What a run was started with. Raises InputError where the folder holds none."""
    path = run / "plan.json"
    if not run.is_dir():
        raise InputError(f"--against {run}: there is no such folder; name a run's, such as runs/quickstart")
    try:
        return Plan.from_json(path.read_text())
    except OSError as error:
        raise InputError(f"--against {run}: is no run's folder, it holds no plan.json") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"--against {run}: plan.json is torn or of another version; train the experiment again"
        ) from error


def run(loaded: Loaded, folder: Path) -> None:
    """Print the comparison.

    Raises InputError where the folder is no run's, the run has another layout, or measured nothing.
    """
    experiment = loaded.experiment
    trained = plan_of(folder)
    planned = make(experiment)
    _refuse_another_layout(folder, trained, planned)
    found = compare(planned, _records(folder, experiment))
    console = console_of_tables()
    console.print(f"[bold]{experiment.name}[/] beside {folder}, times from {planned.forecast.source}\n")
    ranks = [str(pair.rank) for pair in found.forward_ms]
    for title, pairs in found.columns.items():
        per = {"idle": " an iteration", "memory": " at most"}.get(title, " a microbatch")
        console.print(f"[bold]{title.capitalize()}[/], {pairs[0].unit}{per}")
        print_table(
            console,
            {
                "PP rank": ranks,
                "foretold": [number(pair.foretold) for pair in pairs],
                "measured": ["-" if pair.measured is None else number(pair.measured) for pair in pairs],
                "difference": [_percent(pair.difference) for pair in pairs],
            },
        )
    speed = found.speed
    console.print(
        f"Speed   {number(speed.foretold)} tokens/s foretold, {number(speed.measured or 0)} measured: "
        f"{_percent(speed.difference)}"
    )
    console.print(
        f"Measured are medians: of {plural(found.detailed_steps, 'step')} for passes, idle time and memory, "
        f"of {found.steps:,} for the speed."
    )
    console.print(verdict(found))


def compare(planned: Plan, records: Sequence[dict[str, Any]]) -> Comparison:
    """The forecast of a plan beside the records of a run, those of details among them."""
    details = [record for record in records if _STAGE[0] in record]
    ranks = planned.forecast.ranks

    def measured(key: str, rank: int) -> float | None:
        values = [record[key][rank] for record in details]
        told = [value for value in values if value is not None]
        return statistics.median(told) if told else None

    def pairs(what: str, key: str, unit: str, foretold: Sequence[float], times: int) -> tuple[Pair, ...]:
        return tuple(
            Pair(what, rank, unit, value, measured(key, rank), times) for rank, value in enumerate(foretold)
        )

    speed = planned.forecast.tokens_per_second_per_gpu * planned.layout.world_size
    microbatches = planned.num_microbatches
    memory = [(rank.memory.total - rank.memory.reserved) / _GIB for rank in ranks]
    return Comparison(
        pairs("the forward pass", _STAGE[0], "ms", [1000 * rank.forward_s for rank in ranks], microbatches),
        pairs("the backward pass", _STAGE[1], "ms", [1000 * rank.backward_s for rank in ranks], microbatches),
        pairs("waiting", _STAGE[2], "ms", [1000 * rank.idle_s for rank in ranks], 1),
        pairs("memory", _STAGE[3], "GiB", memory, 1),
        Pair("speed", 0, "tokens/s", speed, statistics.median(r["tokens_per_second"] for r in records)),
        len(records),
        len(details),
    )


def verdict(found: Comparison) -> str:
    """Where the model was off most, in a sentence: by what it makes of an iteration."""
    passes = [pair for pair in (*found.forward_ms, *found.backward_ms) if pair.measured is not None]
    memory = [pair for pair in found.memory_gib if pair.difference is not None]
    everything = [*passes, *memory]
    if everything and all(abs(pair.difference or 0) <= _CLOSE for pair in everything):
        return f"Passes and memory of every pipeline rank are within {100 * _CLOSE:.0f} % of the forecast."
    parts = []
    if passes:
        parts.append(
            _said(max(passes, key=lambda pair: pair.times * abs(pair.foretold - (pair.measured or 0))))
        )
    if memory:
        worst = max(memory, key=lambda pair: abs(pair.difference or 0))
        if abs(worst.difference or 0) > _CLOSE:
            parts.append(_said(worst))
    return f"The model was off most in {', and in '.join(parts)}." if parts else "The run measured no passes."


def _said(pair: Pair) -> str:
    return (
        f"{pair.what} of pipeline rank {pair.rank}: {number(pair.foretold)} {pair.unit} foretold, "
        f"{number(pair.measured or 0)} measured ({_percent(pair.difference)})"
    )


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:+.1f} %"


def _records(folder: Path, experiment: Experiment) -> list[dict[str, Any]]:
    """The run's whole steps; not the first one, in which much is done for the first time."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
        records = [json.loads(line) for line in lines]
    except OSError as error:
        raise InputError(f"--against {folder}: the run has no metrics.jsonl; train some steps") from error
    except ValueError as error:
        raise InputError(f"{path}: holds a torn line; `train` repairs it when it goes on") from error
    full = experiment.training.global_batch_size
    records = [record for record in records if record.get("global_batch_size", full) == full]
    later = [record for record in records if record["iteration"] > 1]
    if not any(_STAGE[0] in record for record in later):
        raise InputError(
            f"--against {folder}: no step of the run measured its stages, which every "
            "logging.detail_interval-th does; train longer, or with logging.detail_interval=2"
        )
    return later


def _refuse_another_layout(folder: Path, trained: Plan, planned: Plan) -> None:
    theirs, ours = _named(trained), _named(planned)
    differing = [f"{what} {theirs[what]} (here {ours[what]})" for what in ours if theirs[what] != ours[what]]
    if differing:
        raise InputError(
            f"--against {folder}: the run has {', '.join(differing)}: plan its own {folder / 'resolved.yaml'}"
        )


def _named(plan: Plan) -> dict[str, object]:
    """What has to be equal, in words."""
    layout = plan.layout
    return {
        "parameters": f"{plan.parameters.total:,}",
        # What else the shapes of a microbatch change.
        "FLOPs a token": f"{plan.flops_per_token:,.0f}",
        "TP": layout.tensor_model_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "VPP": layout.virtual_pipeline_model_parallel_size,
        "CP": layout.context_parallel_size,
        "EP": layout.expert_model_parallel_size,
        "ETP": layout.expert_tensor_parallel_size,
        "DP": layout.data_parallel_size,
        "layers a stage": [len(stage.layers) for stage in plan.stages],
        "recomputed layers a stage": [stage.recomputed for stage in plan.stages],
        "microbatches": plan.num_microbatches,
    }
