"""The learning rates of those weights that have rates of their own."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.schema import Optimizer


@dataclass(frozen=True)
class Rates:
    """Where the schedule begins and ends for some weights: peak, and rate at the end of the decay."""

    peak: float
    least: float


def main_rates(optimizer: Optimizer) -> Rates:
    """Those of all weights that have none of their own."""
    return Rates(optimizer.lr, optimizer.min_lr)


def own_rates(optimizer: Optimizer) -> dict[str, Rates]:
    """`embedding` (word embedding and output layer) and `experts` (the routed ones), where a key sets
    them."""
    keys = {
        "embedding": (optimizer.decoupled_lr, optimizer.decoupled_min_lr),
        "experts": (optimizer.expert_lr, optimizer.expert_min_lr),
    }
    return {
        name: Rates(
            optimizer.lr if peak is None else peak,
            optimizer.min_lr if least is None else least,
        )
        for name, (peak, least) in keys.items()
        if peak is not None or least is not None
    }
