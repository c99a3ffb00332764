"""The router: logits, a gate, losses, capacity and statistics, in that order."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.attached import attach
from megatron_moe.model.moe.capacity import Capacity
from megatron_moe.model.moe.coefficients import coefficient
from megatron_moe.model.moe.gates import GATES
from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.losses import LOSSES
from megatron_moe.model.moe.losses.loss import LossInput
from megatron_moe.model.moe.losses.z_loss import z_loss
from megatron_moe.model.moe.microbatch import Microbatch
from megatron_moe.model.moe.routing import Routing
from megatron_moe.model.moe.statistics import RoutingStatistics

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Router(torch.nn.Module):
    """Chooses k experts for each token.

    Knows no Megatron-Core. Whatever it decides is decided over the whole microbatch, so that neither the
    layout nor recompute changes it; padding counts nowhere.

    Args:
        moe: the settings.
        hidden_size: h.
        groups: over which the microbatch is spread.
        seed: of random gates.
        gate: takes the place of the gate that the settings name.
        dtype: of the weights.

    Parameters:
        weight: [e, h]. bias: [e], where `has_bias`.
    """

    def __init__(
        self,
        moe: MoE,
        hidden_size: int,
        groups: MoEGroups | None = None,
        *,
        seed: int = 0,
        gate: Gate | None = None,
        has_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.moe, self.groups, self.seed = moe, groups or MoEGroups(), seed
        self.layer_number = 0
        self.dtype = DTYPES[moe.moe_router_dtype]
        self.gate = gate or GATES[moe.moe_router_gate](moe, hidden_size)
        experts = moe.num_moe_experts
        self.weight = torch.nn.Parameter(torch.empty(experts, hidden_size, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(experts, dtype=dtype, device=device)) if has_bias else None
        torch.nn.init.normal_(self.weight, std=0.02 * moe.moe_router_init_scale)
        names, settings = _as_lists(moe)
        self.losses = [LOSSES[name] for name in names]
        self.coefficients = torch.nn.ModuleList(coefficient(setting) for setting in settings)
        self.z_coefficient = coefficient(moe.moe_z_loss_coeff)
        self.capacity = Capacity(moe)
        self.statistics = RoutingStatistics(experts)

    def set_layer_number(self, layer_number: int) -> None:
        """Which transformer layer this is, from 1."""
        self.layer_number = layer_number

    def forward(self, hidden: Tensor, marks: Tensor | None = None) -> Routing:
        """Args:
        hidden: [s, b, h] of this rank's tokens.
        marks: [s, b], see `Microbatch`.
        """
        length, batch, width = hidden.shape
        microbatch = Microbatch(length, batch, self.groups, marks, hidden.device)
        tokens = hidden.reshape(-1, width)
        logits = self._logits(tokens)
        choice = self.gate(GateInput(tokens, logits, microbatch, None, self.seed + self.layer_number))
        # Recompute runs this twice, first without gradients; evaluation never has them.
        counts = self.training and torch.is_grad_enabled()
        if counts:
            choice = self._with_losses(logits, choice, microbatch)
        routing = self.capacity.apply(choice, microbatch, self.training)
        if counts:
            self.statistics.record(logits, choice, routing, microbatch)
        return routing

    def _logits(self, tokens: Tensor) -> Tensor:
        """[t, h] -> [t, e] in the router's own precision."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return F.linear(tokens.to(self.dtype), self.weight.to(self.dtype), bias)

    def _with_losses(self, logits: Tensor, choice: Choice, microbatch: Microbatch) -> Choice:
        """The choice, whose weights bring the gradients of all losses with them."""
        given = LossInput(logits, choice, microbatch, self.moe)
        weights = choice.weights
        for loss, factor in [*zip(self.losses, self.coefficients, strict=True), (z_loss, self.z_coefficient)]:
            if factor.value:
                weights = attach(weights, factor.value * loss(given))
        return replace(choice, weights=weights)


def _as_lists(moe: MoE) -> tuple[list[str], list[object]]:
    """Names of the balancing losses and their coefficients, one for each."""
    names, settings = moe.moe_router_load_balancing_type, moe.moe_aux_loss_coeff
    names = names if isinstance(names, list) else [names]
    settings = settings if isinstance(settings, list) else [settings] * len(names)
    pairs = [(name, setting) for name, setting in zip(names, settings, strict=True) if name != "none"]
    return [name for name, _ in pairs], [setting for _, setting in pairs]
