"""Where an experiment says `auto`, what the planner puts there."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from megatron_moe.config.errors import InputError
from megatron_moe.config.keys import leaves
from megatron_moe.config.layout_string import AUTO, layers_are_placed, layers_per_stage
from megatron_moe.config.loading import Loaded
from megatron_moe.config.origin import Origin
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.assembly import assemble
from megatron_moe.plan.batch_ramp import num_microbatches
from megatron_moe.plan.costs import trained
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.placement import placement
from megatron_moe.plan.profile import Profile, profile_of
from megatron_moe.plan.times.cluster import Cluster

_LAYERS, _COUNTS = "pipeline.layers_per_stage", "recompute.layers_per_stage"


def has_auto(experiment: Experiment) -> bool:
    """Whether the planner is to say where layers are, or how many are computed again."""
    return layers_are_placed(experiment) or experiment.recompute.layers_per_stage == AUTO


def resolve(loaded: Loaded) -> Loaded:
    """The experiment with lists in the places of `auto`, and where they come from.

    Raises InputError where no placement fits the memory, and where `training.freeze` means no weights.
    """
    experiment = loaded.experiment
    trained.check(experiment)
    if not has_auto(experiment):
        return loaded
    planned = [_LAYERS] * layers_are_placed(experiment)
    planned += [_COUNTS, "recompute.granularity"] * (experiment.recompute.layers_per_stage == AUTO)
    provenance = {**loaded.provenance, **dict.fromkeys(planned, Origin("planned"))}
    changed = placed(experiment, profile_of(experiment))
    return replace(loaded, experiment=changed, provenance=provenance)


class Placed(NamedTuple):
    """What came of `auto`."""

    experiment: Experiment
    """With lists in its places."""
    gap: float | None
    """By which part of the pipeline's time another placement might be faster; 0: none is. None where there
    was nothing to place."""


def placed(experiment: Experiment, measured: Profile | None, prove: bool = True) -> Experiment:
    """The experiment of `place`."""
    return place(experiment, measured, prove).experiment


def place(experiment: Experiment, measured: Profile | None, prove: bool = True) -> Placed:
    """A filled experiment with lists in the places of `auto`; itself where there is none.

    Args:
        measured: what takes the place of the models' times and bytes.
        prove: that the placement is the fastest; see `placement.place`.

    Raises InputError where no placement fits the memory, or what is fixed does not go with what was found, or
    `training.freeze` means no weights.
    """
    trained.check(experiment)
    if not has_auto(experiment):
        return Placed(experiment, None)
    layout, cluster = Layout.of(experiment), Cluster.of(experiment)
    recompute = experiment.recompute
    counts = recompute.layers_per_stage
    found = placement.place(
        assemble(experiment, layout, cluster, measured),
        pipeline_size=layout.pipeline_model_parallel_size,
        chunks=layout.virtual_pipeline_model_parallel_size,
        num_microbatches=num_microbatches(experiment),
        memory_bytes=cluster.usable_bytes,
        fixed_layers=None if layers_are_placed(experiment) else layers_per_stage(experiment),
        fixed_recompute=counts if isinstance(counts, list) else None,
        method=recompute.method,
        mtp_stage=experiment.pipeline.mtp_stage,
        prove=prove,
    )
    is_planned, again = counts == AUTO, any(found.recompute_per_rank)
    recomputed = [
        # All layers of the model stand for all that the rank turns out to hold.
        min(count, max(found.layers_per_stage[rank :: layout.pipeline_model_parallel_size]))
        if count == experiment.model.num_layers
        else count
        for rank, count in enumerate(found.recompute_per_rank)
    ]
    changed = experiment.model_copy(
        update={
            "pipeline": experiment.pipeline.model_copy(
                update={"layers_per_stage": list(found.layers_per_stage)}
            ),
            "recompute": recompute.model_copy(
                update={
                    "layers_per_stage": recomputed,
                    "granularity": "none" if is_planned and not again else recompute.granularity,
                }
            ),
        }
    )
    values = dict(leaves(changed))
    if problems := [problem.render(values, {}) for problem in violations(changed)]:
        raise InputError(*problems)
    return Placed(changed, found.gap)
