"""Whether a model's weights are all there, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_moe.convert.weights import Weights


def faults(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> Iterator[str]:
    """What the weights lack, have too many, or have in another shape: a line for each kind, which names all.

    Args:
        expected: the shapes of the model's weights by name.
    """
    found = weights.inventory()
    if missing := sorted(expected.keys() - found.keys()):
        yield f"{len(missing)} weights of the model are missing: {', '.join(missing)}"
    yield from _misfits(expected, weights)
    if unexpected := sorted(found.keys() - expected.keys()):
        yield f"{len(unexpected)} weights are not the model's: {', '.join(unexpected)}"


def _misfits(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> Iterator[str]:
    found = weights.inventory()
    misfits = sorted(name for name, shape in expected.items() if name in found and found[name].shape != shape)
    if not misfits:
        return
    origin = getattr(weights, "origin", None)
    parts = []
    for name in misfits:
        source = f", from {origin(name)}" if origin is not None else ""
        parts.append(f"{name} {list(found[name].shape)} instead of {list(expected[name])}{source}")
    yield f"{len(misfits)} weights have another shape than the model's: {'; '.join(parts)}"
