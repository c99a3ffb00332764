"""The plan of an experiment: what `train` runs, `plan` prints and plan.json in the run folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter

from megatron_moe.config.schema import Experiment
from megatron_moe.plan import journeys
from megatron_moe.plan.assembly import assemble
from megatron_moe.plan.auto import place
from megatron_moe.plan.batch_ramp import num_microbatches
from megatron_moe.plan.costs import parameters as costs
from megatron_moe.plan.forecast import Forecast
from megatron_moe.plan.forecasting import foretell
from megatron_moe.plan.layout import GROUP_KINDS, Layout
from megatron_moe.plan.profile import profile_of
from megatron_moe.plan.stages import Stage, stages_of
from megatron_moe.plan.times.cluster import Cluster


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before it starts."""

    layout: Layout
    num_moe_experts: int
    """Routed experts of an MoE layer; 0 for a dense model."""
    dispatch: journeys.Choice | None
    """How tokens travel to them; None for a dense model."""
    stages: tuple[Stage, ...]
    stage_costs: tuple[costs.StageCosts, ...]
    """One entry a stage."""
    parameters: costs.Parameters
    flops_per_token: float
    num_microbatches: int
    """Of a replica in a step with the whole global batch."""
    forecast: Forecast
    placement_gap: float | None = None
    """By which part of the pipeline's time another placement of layers and recomputation might be faster than
    the planner's; None where the experiment gives them."""

    def stages_on(self, rank: int) -> tuple[Stage, ...]:
        """The stages that a rank holds, by model chunk."""
        pipeline_rank = self.layout.coordinates(rank).pp
        return tuple(stage for stage in self.stages if stage.pipeline_rank == pipeline_rank)

    @property
    def rank_of_embedding_copy(self) -> int | None:
        """The pipeline rank that multi-token prediction gives a copy of the embedding; None where the first
        has it."""
        return next((s.pipeline_rank for s in self.stages if s.num_mtp_layers and s.pipeline_rank), None)

    def experts_on(self, rank: int) -> range:
        """The experts of each MoE layer that a rank holds; empty for a dense model."""
        return self.layout.experts_of(rank, self.num_moe_experts) if self.num_moe_experts else range(0)

    def to_json(self) -> str:
        """The plan as JSON, with what follows from it (groups, experts of each rank) for other programs."""
        stages = zip(self.stages, self.stage_costs, strict=True)
        experts = [list(self.experts_on(rank)) for rank in range(self.layout.world_size)]
        record = {
            "parameters": asdict(self.parameters),
            "flops_per_token": self.flops_per_token,
            "flops_formula": costs.FORMULA,
            "world_size": self.layout.world_size,
            "layout": asdict(self.layout),
            "expert_data_parallel_size": self.layout.expert_data_parallel_size,
            "num_moe_experts": self.num_moe_experts,
            "dispatch": None if self.dispatch is None else asdict(self.dispatch),
            "tokens_leave_replica": self.layout.experts_cross_replicas,
            "stages": [asdict(stage) | asdict(cost) for stage, cost in stages],
            "groups": {kind: self.layout.groups(kind) for kind in GROUP_KINDS},
            "experts_of_rank": experts,
            "num_microbatches": self.num_microbatches,
            "forecast": asdict(self.forecast),
            "placement_gap": self.placement_gap,
        }
        return _readable(record)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        record = json.loads(text)
        return cls(
            layout=Layout(**_fields_of(Layout, record["layout"])),
            num_moe_experts=record["num_moe_experts"],
            dispatch=None if record["dispatch"] is None else journeys.Choice.of(record["dispatch"]),
            stages=tuple(Stage(**_fields_of(Stage, stage)) for stage in record["stages"]),
            stage_costs=tuple(
                costs.StageCosts(**_fields_of(costs.StageCosts, stage)) for stage in record["stages"]
            ),
            parameters=costs.Parameters(**_fields_of(costs.Parameters, record["parameters"])),
            flops_per_token=record["flops_per_token"],
            num_microbatches=record["num_microbatches"],
            forecast=TypeAdapter(Forecast).validate_python(record["forecast"]),
            placement_gap=record["placement_gap"],
        )


def make(experiment: Experiment, *, profiled: bool = True) -> Plan:
    """The plan of a filled experiment.

    Args:
        profiled: whether a profile that there is takes the place of the model's times.

    Raises InputError where it says `auto` and nothing fits, and where a profile is of another model or
    device.
    """
    measured = profile_of(experiment) if profiled else None
    experiment, gap = place(experiment, measured)
    layout, cluster = Layout.of(experiment), Cluster.of(experiment)
    units = assemble(experiment, layout, cluster, measured)
    stages = stages_of(experiment)
    return Plan(
        layout=layout,
        num_moe_experts=experiment.moe.num_moe_experts if experiment.moe else 0,
        dispatch=journeys.choice(experiment) if experiment.moe else None,
        stages=stages,
        stage_costs=tuple(costs.stage_costs(experiment, layout, stage) for stage in stages),
        parameters=costs.count_parameters(experiment),
        flops_per_token=costs.flops_per_token(experiment),
        num_microbatches=num_microbatches(experiment),
        forecast=foretell(experiment, layout, stages, units, cluster, measured),
        placement_gap=gap,
    )


def _fields_of(kind: type, record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the dataclass `kind` out of a JSON object, lists as tuples."""
    values = {field.name: record[field.name] for field in fields(kind)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _readable(record: Mapping[str, object]) -> str:
    """JSON with one line for each key, and for each entry of `stages` and `groups`."""
    lines = []
    for key, value in record.items():
        if key == "stages" and isinstance(value, list):
            text = "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
        elif key == "groups" and isinstance(value, dict):
            entries = (f"{json.dumps(kind)}: {json.dumps(ranks)}" for kind, ranks in value.items())
            text = "{\n    " + ",\n    ".join(entries) + "\n  }"
        else:
            text = json.dumps(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
