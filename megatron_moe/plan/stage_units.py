"""What a stage costs, from its pieces and the layers of it that the backward pass computes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.plan.units import StaticBytes, Unit, Units


@dataclass(frozen=True)
class StageCost:
    """One stage on one of its ranks; activations and times of one microbatch."""

    memory: StaticBytes
    kept_bytes: float
    working_bytes: float
    """At the piece, or the group of layers that is computed again at once, that needs most."""
    forward_s: float
    backward_s: float
    """Recomputation included."""
    recompute_s: float
    weight_gradient_s: float
    exposed_s: float
    hidden_s: float


def stage_cost(
    units: Units, layers: range, *, method: str, count: int, is_first: bool, is_last: bool, has_mtp: bool
) -> StageCost:
    """The costs of consecutive layers with what stands beside them.

    Args:
        layers: numbers of the layers, from 0.
        method: `block`: the first `count` layers are computed again, each by itself; `uniform`: all, in
            groups of `count` that keep their input only.
        count: what Megatron-Core is told for this rank; 0: nothing is computed again.
        is_first: whether the embedding is here.
        is_last: whether the output layer and the loss are here.
        has_mtp: whether the multi-token-prediction layers are here.
    """
    held = [units.layers[layer] for layer in layers]
    groups = _groups(held, method, count)
    again = [unit for group in groups for unit in group]
    whole = [units.embedding] * is_first + held[len(again) :]
    if has_mtp and units.mtp is not None:
        whole.append(units.mtp)
    whole += [units.head] * is_last
    everything = [*again, *whole]
    memory = sum((unit.memory for unit in everything), StaticBytes(0, 0, 0))
    if not is_first:
        copies = [units.shared_embedding] * is_last + [units.mtp_embedding] * has_mtp
        memory = sum(copies, memory)
    kept = sum(unit.activations.kept for unit in whole)
    kept += sum(group[0].activations.kept_if_recomputed for group in groups)
    # A group that is computed again is there whole while its backward pass runs.
    working = [unit.activations.working for unit in whole]
    working += [
        sum(unit.activations.kept for unit in group) + max(unit.activations.working for unit in group)
        for group in groups
    ]
    recompute_s = sum(unit.times.recompute_s for unit in again)
    return StageCost(
        memory=memory,
        kept_bytes=kept,
        working_bytes=max(working, default=0.0),
        forward_s=sum(unit.times.forward_s for unit in everything),
        backward_s=sum(unit.times.backward_s for unit in everything) + recompute_s,
        recompute_s=recompute_s,
        weight_gradient_s=sum(unit.times.weight_gradient_s for unit in everything),
        exposed_s=sum(unit.times.exposed_s for unit in everything),
        hidden_s=sum(unit.times.hidden_s for unit in everything),
    )


def _groups(held: Sequence[Unit], method: str, count: int) -> list[Sequence[Unit]]:
    """The layers that are computed again, those at once together."""
    if count == 0:
        return []
    if method == "block":
        return [[unit] for unit in held[:count]]
    return [held[first : first + count] for first in range(0, len(held), count)]
