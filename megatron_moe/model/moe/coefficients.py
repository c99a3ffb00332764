"""What a loss is multiplied by: a constant, a schedule, or a follower of the drop rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_moe.config.schema.moe import AdaptiveCoefficient, ScheduledCoefficient
from megatron_moe.model.moe.exact_buffers import ExactBuffers

Setting = float | AdaptiveCoefficient | ScheduledCoefficient


class Coefficient(ExactBuffers):
    """A constant; the others derive from it. Their buffers are saved with the checkpoint.

    Args:
        setting: the constant.
    """

    def __init__(self, setting: float) -> None:
        super().__init__()
        self.constant = setting

    @property
    def value(self) -> float | Tensor:
        """The coefficient of the current iteration: a number where it never changes, else [] float64."""
        return self.constant

    @property
    def is_off(self) -> bool:
        """Whether it is 0 for ever."""
        return not isinstance(self.value, Tensor) and self.value == 0

    def forward(self, loss: Tensor) -> Tensor:
        """The loss times the coefficient, in the loss's own precision."""
        value = self.value
        return loss * (value.to(loss.dtype) if isinstance(value, Tensor) else value)

    def end_iteration(self, drop_rate: float | None) -> None:
        """Go on to the next iteration.

        Args:
            drop_rate: of this layer over the global batch; None where it routed no token.
        """


class Adaptive(Coefficient):
    """alpha <- beta * alpha + (1 - beta) * min(xi * d, maximum), d the drop rate (Skywork-MoE, eqs. 7 to 9).

    Buffers:
        alpha: [1] float64.
    """

    alpha: Tensor

    def __init__(self, setting: AdaptiveCoefficient) -> None:
        super().__init__(setting.initial)
        self.xi, self.maximum, self.beta = setting.xi, setting.maximum, setting.beta
        self.register_buffer("alpha", torch.tensor([setting.initial], dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        return self.alpha[0]

    def end_iteration(self, drop_rate: float | None) -> None:
        if drop_rate is not None:
            target = min(self.xi * drop_rate, self.maximum)
            self.alpha.mul_(self.beta).add_((1 - self.beta) * target)


class Scheduled(Coefficient):
    """From `start` before the first iteration to `end` after `iterations`, then `end`.

    Buffers:
        done: [1] float64, iterations. Not an integer: what a checkpoint holds of a router is compared as its
            weights are (`verify`).
    """

    done: Tensor

    def __init__(self, setting: ScheduledCoefficient) -> None:
        super().__init__(setting.start)
        self.start, self.end, self.iterations = setting.start, setting.end, setting.iterations
        self.is_cosine = setting.style == "cosine"
        self.register_buffer("done", torch.zeros(1, dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        way = (self.done[0] / self.iterations).clamp(max=1)
        if self.is_cosine:
            way = (1 - torch.cos(math.pi * way)) / 2
        # Both ends are met exactly.
        return self.start * (1 - way) + self.end * way

    def end_iteration(self, drop_rate: float | None) -> None:
        self.done.add_(1)


def coefficient(setting: Setting) -> Coefficient:
    """The coefficient that a setting describes."""
    if isinstance(setting, AdaptiveCoefficient):
        return Adaptive(setting)
    return Scheduled(setting) if isinstance(setting, ScheduledCoefficient) else Coefficient(setting)
