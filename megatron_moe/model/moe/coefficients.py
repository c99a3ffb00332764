"""What a loss is multiplied by: a constant, a schedule, or a follower of the drop rate."""

from __future__ import annotations

import torch

from megatron_moe.config.schema.moe import AdaptiveCoefficient, ScheduledCoefficient


class Coefficient(torch.nn.Module):
    """A constant; the others derive from it. Their state is saved with the checkpoint.

    Args:
        value: the constant.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.constant = value

    @property
    def value(self) -> float:
        """The coefficient of the current iteration."""
        return self.constant

    def end_iteration(self, drop_rate: float) -> None:
        """Go on to the next iteration.

        Args:
            drop_rate: of this layer, over the global batch.
        """


def coefficient(setting: float | AdaptiveCoefficient | ScheduledCoefficient) -> Coefficient:
    """The coefficient that a setting describes."""
    if isinstance(setting, AdaptiveCoefficient | ScheduledCoefficient):
        raise NotImplementedError
    return Coefficient(setting)
