"""The pieces of an experiment's model, and what each costs on this layout: models and measurements."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment
from megatron_moe.plan import profile
from megatron_moe.plan.costs import memory
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.stages import moe_layers
from megatron_moe.plan.times import timing
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.units import Activations, Kind, StaticBytes, Times, Unit, Units

Running = dict[Kind, tuple[Activations, Times]]
"""What pieces keep and take while a microbatch passes."""


def assemble(
    experiment: Experiment,
    layout: Layout,
    cluster: Cluster,
    measured: profile.Profile | None,
    memories: dict[Kind, StaticBytes] | None = None,
    running: Running | None = None,
) -> Units:
    """The model of a filled experiment in pieces.

    Args:
        measured: times and activation bytes that take the place of the models' where it has the piece.
        memories, running: of pieces, of an experiment in which they are the same; filled where they are not
            there yet.
    """
    memories, running = {} if memories is None else memories, {} if running is None else running
    with_experts = frozenset(moe_layers(experiment))
    kinds: list[Kind] = [
        "moe" if layer in with_experts else "dense" for layer in range(experiment.model.num_layers)
    ]
    mtp: list[Kind] = ["mtp"] if experiment.model.mtp_num_layers else []
    there: list[Kind] = ["embedding", *kinds, *mtp, "head"]
    for kind in dict.fromkeys(there):
        if kind not in memories:
            memories[kind] = memory.static_bytes(experiment, layout, kind)
        if kind not in running:
            running[kind] = _running(experiment, layout, cluster, measured, kind)
    pieces = {kind: Unit(kind, memories[kind], *running[kind]) for kind in dict.fromkeys(there)}
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
        # A tied output layer beside it has another copy (Megatron-Core 0.16.1 and 0.19.2).
        mtp_embedding=memories["embedding"] if mtp else StaticBytes(0, 0, 0),
    )


def _running(
    experiment: Experiment,
    layout: Layout,
    cluster: Cluster,
    measured: profile.Profile | None,
    kind: Kind,
) -> tuple[Activations, Times]:
    if measured is not None and kind in measured.kinds:
        return measured.activations(kind), measured.times(kind)
    return memory.activations(experiment, layout, kind), timing.times(experiment, layout, cluster, kind)
