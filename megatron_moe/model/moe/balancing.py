"""The losses of one router, their coefficients, and what these carry from one iteration to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.attached import Scale, attach
from megatron_moe.model.moe.coefficients import Coefficient, Setting, coefficient
from megatron_moe.model.moe.exact_buffers import ExactBuffers
from megatron_moe.model.moe.gates.gate import Choice
from megatron_moe.model.moe.losses import LOSSES
from megatron_moe.model.moe.losses.loss import LossInput
from megatron_moe.model.moe.losses.z_loss import z_loss
from megatron_moe.model.moe.microbatch import Microbatch

OF_GLOBAL_BATCH = "global_aux_loss"
"""The loss that looks at the previous global batch."""


def losses_of(moe: MoE) -> dict[str, Setting]:
    """The balancing losses by name with their coefficients, in the order of the settings. One coefficient
    beside several losses is that of each."""
    names, settings = moe.moe_router_load_balancing_type, moe.moe_aux_loss_coeff
    names = names if isinstance(names, list) else [names]
    settings = settings if isinstance(settings, list) else [settings] * len(names)
    return {name: setting for name, setting in zip(names, settings, strict=True) if name != "none"}


class Balancing(ExactBuffers):
    """Attaches the losses of a router to its gate weights.

    Args:
        moe: the settings.

    Attributes:
        coefficients: of the balancing losses, by name.
        z_coefficient: of the z-loss.
        mean_tokens: [] valid tokens of the coming global batch over its microbatches, set before an iteration
            for the loss over the global batch; None: each microbatch takes its own.
        values: what the balancing losses came to, [losses] float64 a microbatch.
        is_attached: the gate weights bring the losses' gradients; else `collected` has them.
        collected: [] sum of the losses of the last microbatch, times their coefficients, differentiable; 0
            where there are none.

    Buffers:
        previous_fractions: [e] float64, each expert's share of the previous global batch's assignments, 1/e
            before the first; there for the loss over the global batch.
    """

    previous_fractions: Tensor | None

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.coefficients: dict[str, Coefficient] = {}
        for name, setting in losses_of(moe).items():
            self.coefficients[name] = coefficient(setting)
            self.add_module(name, self.coefficients[name])
        self.z_coefficient = coefficient(moe.moe_z_loss_coeff)
        self.mean_tokens: Tensor | None = None
        self.values: list[Tensor] = []
        self.is_attached, self.collected = True, torch.zeros(())
        even = torch.full((moe.num_moe_experts,), 1 / moe.num_moe_experts, dtype=torch.float64)
        self.register_buffer("previous_fractions", even if OF_GLOBAL_BATCH in self.coefficients else None)

    def attach(self, logits: Tensor, choice: Choice, microbatch: Microbatch, scale: Scale) -> Tensor:
        """The choice's gate weights, which bring the gradients of all losses with them.

        Args:
            logits: [t, e], as the router computed them.
            scale: of the gradients, see `attached`.
        """
        given = LossInput(logits, choice, microbatch, self.moe, self.previous_fractions, self.mean_tokens)
        losses, values = [], []
        for name, factor in self.coefficients.items():
            loss = LOSSES[name](given)
            values.append(loss.detach().double())
            if not factor.is_off:
                losses.append(factor(loss))
        if values:
            self.values.append(torch.stack(values))
        if not self.z_coefficient.is_off:
            losses.append(self.z_coefficient(z_loss(given)))
        if not self.is_attached:
            self.collected = torch.stack(losses).sum() if losses else torch.zeros((), device=logits.device)
            return choice.weights
        weights = choice.weights
        for loss in losses:
            weights = attach(weights, loss, scale)
        return weights

    def take_values(self) -> Tensor:
        """[losses] sums over the microbatches since this was last asked, in float64 on the host or device of
        the losses; of none zeros."""
        values, self.values = self.values, []
        return (
            torch.stack(values).sum(0) if values else torch.zeros(len(self.coefficients), dtype=torch.float64)
        )

    @torch.no_grad()
    def end_iteration(self, load: Tensor, drop_rate: float | None) -> None:
        """See `Router.end_iteration`."""
        for factor in (*self.coefficients.values(), self.z_coefficient):
            factor.end_iteration(drop_rate)
        if self.previous_fractions is not None and (total := float(load.sum())):
            self.previous_fractions.copy_(load / total)
