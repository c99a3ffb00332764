"""Better placements next to a given one."""

from __future__ import annotations

from megatron_moe.plan.placement.candidates import TIE, Candidates, Layers

_EFFORT = 500_000
"""Stages of placements to look at before `improve` is content: some seconds."""


def least_missing(candidates: Candidates, start: Layers) -> Layers:
    """A placement that fits, or one to whose neighbours ranks lack as many bytes together or more."""

    def lacking(layers: Layers) -> float:
        return sum([choice.missing_bytes for choice in candidates.ranks(layers)])

    best, least = start, lacking(start)
    while least:
        found = min(candidates.neighbours(best), key=lacking, default=best)
        if (now := lacking(found)) >= least:
            break
        best, least = found, now
    return best


def improve(candidates: Candidates, start: Layers) -> Layers:
    """From a placement that fits to one none of whose neighbours is better, or among very many stages to one
    that is near it.

    Better is faster, or as fast and with less recomputation, or with as much of it and more even.
    """

    def rank(layers: Layers, span: float) -> tuple[float, float, int]:
        return span, candidates.recompute_s(layers), sum(count * count for count in layers)

    best, value = start, rank(start, float(candidates.estimates([start])[0]))
    for _ in range(1 + _EFFORT // candidates.num_stages**3):
        longest_s = value[0] * (1 + TIE)
        others = [other for other in candidates.neighbours(best) if candidates.may_take(other, longest_s)]
        if not others:
            return best
        spans = candidates.estimates(others).tolist()
        shortest = min(spans)
        found = min(
            (rank(other, shortest), other)
            for other, span in zip(others, spans, strict=True)
            if span <= shortest * (1 + TIE)
        )
        if not _is_less(found[0], value):
            return best
        value, best = found
    return best


def _is_less(one: tuple[float, float, int], other: tuple[float, float, int]) -> bool:
    """By the first entry in which they differ by more than rounding."""
    for a, b in zip(one, other, strict=True):
        if abs(a - b) > TIE * abs(b):
            return a < b
    return False
