"""Memory of pieces, from what was read at the places between them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe.engine.memory import Reading
from megatron_moe.engine.piece_marks import BACK, BEGIN, END, OUTPUT, place
from megatron_moe.engine.stopwatch import BACKWARD, FORWARD
from megatron_moe.plan.units import Kind

Bytes = list[tuple[Kind, float]]
"""One entry a piece."""


def kept_and_working(
    moments: Sequence[tuple[str, Reading]], layers: Sequence[Kind], has_mtp: bool, boundary_bytes: int
) -> tuple[Bytes, Bytes]:
    """What each piece keeps between forward and backward pass, and what it needs beside that while it runs.

    What a piece keeps counts its input, and not its output, which the next piece keeps, or which is sent
    away: as stages do.

    Args:
        moments: readings of the two passes of one microbatch.
        layers: the kind of each layer.
        boundary_bytes: of what goes from layer to layer.
    """
    kept: Bytes = []
    working: Bytes = []
    for kind, begin, end in _pieces(layers, has_mtp):
        before, after, most = _between(moments, begin, end)
        boundary = boundary_bytes * ((kind == "head") - (kind == "embedding"))
        kept.append((kind, max(0, after - before + boundary)))
        back_begin = BEGIN + BACKWARD if kind == "head" else BACK + end
        back_end = END + BACKWARD if kind == "embedding" else BACK + begin
        live, _, most_back = _between(moments, back_begin, back_end)
        # The gradient that it begins with is there already.
        gradient = 0 if kind == "head" else boundary_bytes
        working.append((kind, max(0, most - after, most_back - live + gradient)))
    return kept, working


def _pieces(layers: Sequence[Kind], has_mtp: bool) -> list[tuple[Kind, str, str]]:
    """Each piece between two places of the forward pass."""
    ends = [place(number) for number in range(len(layers) + 1)]
    found: list[tuple[Kind, str, str]] = [("embedding", BEGIN + FORWARD, ends[0])]
    found += [(kind, begin, end) for kind, begin, end in zip(layers, ends, ends[1:], strict=False)]
    if has_mtp:
        found.append(("mtp", ends[-1], OUTPUT))
    return [*found, ("head", found[-1][2], END + FORWARD)]


def _between(moments: Sequence[tuple[str, Reading]], begin: str, end: str) -> tuple[int, int, int]:
    """Live bytes at both, and the most between them."""
    names = [name for name, _ in moments]
    first, last = names.index(begin), names.index(end)
    peak = max(reading.peak for _, reading in moments[first + 1 : last + 1])
    return moments[first][1].live, moments[last][1].live, peak
