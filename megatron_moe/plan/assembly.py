"""The pieces of an experiment's model, and what each costs on this layout: models and measurements."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment
from megatron_moe.plan import profile
from megatron_moe.plan.costs import memory
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.stages import moe_layers
from megatron_moe.plan.times import timing
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.units import Kind, Unit, Units


def assemble(
    experiment: Experiment, layout: Layout, cluster: Cluster, measured: profile.Profile | None
) -> Units:
    """The model of a filled experiment in pieces.

    Args:
        measured: times and activation bytes that take the place of the models' where it has the piece.
    """
    with_experts = frozenset(moe_layers(experiment))
    kinds: list[Kind] = [
        "moe" if layer in with_experts else "dense" for layer in range(experiment.model.num_layers)
    ]
    mtp: list[Kind] = ["mtp"] if experiment.model.mtp_num_layers else []
    there: list[Kind] = ["embedding", *kinds, *mtp, "head"]
    pieces = {kind: _unit(experiment, layout, cluster, measured, kind) for kind in dict.fromkeys(there)}
    transfer_s, transfer_bytes = timing.transfer(experiment, layout, cluster)
    return Units(
        embedding=pieces["embedding"],
        layers=tuple(pieces[kind] for kind in kinds),
        mtp=pieces.get("mtp"),
        head=pieces["head"],
        shared_embedding=memory.shared_embedding(experiment, layout),
        transfer_s=transfer_s,
        transfer_bytes=transfer_bytes,
        source=cluster.source if measured is None else measured.source,
        mtp_embedding=memory.mtp_embedding(experiment, layout),
    )


def _unit(
    experiment: Experiment,
    layout: Layout,
    cluster: Cluster,
    measured: profile.Profile | None,
    kind: Kind,
) -> Unit:
    static = memory.static_bytes(experiment, layout, kind)
    if measured is not None and kind in measured.kinds:
        return Unit(kind, static, measured.activations(kind), measured.times(kind))
    return Unit(
        kind,
        static,
        memory.activations(experiment, layout, kind),
        timing.times(experiment, layout, cluster, kind),
    )
