"""`megatron-moe checkpoint diff`: what two models have in common, weight by weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_moe.convert.models import open_model
from megatron_moe.convert.weights import Weights
from megatron_moe.plan.show.tables import console_of_tables, print_table
from megatron_moe.plan.wording import plural

_SHOWN = 20
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Difference:
    """Of a weight that both models have, in one shape."""

    name: str
    relative: float
    """||a - b|| / ||a||; the norm itself where a is zero."""
    largest: float
    """Of any number, without sign."""
    same_bytes: bool


def differences(first: Weights, second: Weights) -> Iterator[Difference]:
    """Of each weight that both have in the same shape."""
    others = second.inventory()
    for name, weight in first.inventory().items():
        if name in others and others[name].shape == weight.shape:
            yield _difference(name, first.read(name), second.read(name))


def _difference(name: str, one: torch.Tensor, other: torch.Tensor) -> Difference:
    same = one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))
    if same:
        return Difference(name, 0.0, 0.0, True)
    apart = (one.double() - other.double()).abs()
    size = one.double().norm().item()
    return Difference(name, apart.norm().item() / (size or 1.0), apart.max().item(), False)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals NaN here, and zero does not equal minus zero."""
    return tensor.contiguous().flatten().view(torch.uint8)


def show_difference(one: Path, other: Path) -> bool:
    """Print where two models differ, the largest differences first. Returns whether they are the same, to the
    byte."""
    first, second = open_model(one).weights, open_model(other).weights
    here, there = first.inventory(), second.inventory()
    for path, names in ((one, here.keys() - there.keys()), (other, there.keys() - here.keys())):
        if names:
            print(f"Only in {path}: {plural(len(names), 'weight')}")
            kinds = Counter(_NUMBER.sub(".*.", name) for name in names)
            print("\n".join(f"  {kind} ({count:,})" for kind, count in sorted(kinds.items())))
    shapes = [name for name in here if name in there and here[name].shape != there[name].shape]
    for name in shapes:
        print(f"{name}: {list(here[name].shape)} against {list(there[name].shape)}")
    compared = list(differences(first, second))
    changed = sorted((d for d in compared if not d.same_bytes), key=lambda d: -d.relative)
    if changed:
        _print(changed)
    print(f"{plural(len(compared) - len(changed), 'weight')} of {len(compared):,} are the same to the byte.")
    return not changed and here.keys() == there.keys() and not shapes


def _print(changed: list[Difference]) -> None:
    shown = changed[:_SHOWN]
    print_table(
        console_of_tables(),
        {
            "weight": [d.name for d in shown],
            "||a - b|| / ||a||": [f"{d.relative:.2e}" for d in shown],
            "largest": [f"{d.largest:.2e}" for d in shown],
        },
        left=("weight",),
        folded=("weight",),
    )
    if len(changed) > _SHOWN:
        print(f"... and {plural(len(changed) - _SHOWN, 'weight')} that differ less")
