"""How long dense feed-forwards and activations take."""

from __future__ import annotations

from megatron_moe.plan.costs.weight import first_width
from megatron_moe.plan.times.kernels import Cost, Kernels
from megatron_moe.plan.times.work import Work


def feed_forward(work: Work, width: int, kind: str) -> Cost:
    """A feed-forward whose inner width TP ranks share.

    Args:
        kind: the activation's name.
    """
    hidden = work.experiment.model.hidden_size
    cost = work.columns(hidden, first_width(kind, width))
    cost += activation(work.kernels, kind, work.tokens * width / work.tensor)
    return cost + work.rows(width, hidden)


def activation(kernels: Kernels, kind: str, elements: float) -> Cost:
    """An activation with so many elements behind it, in one kernel."""
    before = first_width(kind, 1)
    return kernels.streamed((before + 1) * elements, (2 * before + 1) * elements)
