"""The router: logits, a gate, losses, capacity and statistics, in that order."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.attached import Scale, unscaled
from megatron_moe.model.moe.balancing import Balancing
from megatron_moe.model.moe.capacity import Capacity
from megatron_moe.model.moe.draws import Draws
from megatron_moe.model.moe.exact_buffers import ExactBuffers
from megatron_moe.model.moe.gates import GATES
from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.microbatch import Microbatch
from megatron_moe.model.moe.normalization import normalized
from megatron_moe.model.moe.routing import Routing
from megatron_moe.model.moe.statistics import RoutingStatistics

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Router(ExactBuffers):
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
        weight: [e, h]. bias: [e], where moe_router_bias. A gate that takes no logits has neither.

    Attributes:
        loss_scale: of the gradients of its losses, asked in the backward pass. A program that scales its own
            loss sets it (see `attached`).

    Buffers:
        expert_bias: [e] float32 in every precision of training, where moe_router_enable_expert_bias.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        moe: MoE,
        hidden_size: int,
        groups: MoEGroups | None = None,
        *,
        seed: int = 0,
        gate: Gate | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.moe, self.groups, self.seed = moe, groups or MoEGroups(), seed
        self.layer_number = 0
        self.dtype = DTYPES[moe.moe_router_dtype]
        self.gate = gate or GATES[moe.moe_router_gate](moe, hidden_size).to(device, dtype)
        experts = moe.num_moe_experts
        self.weight: torch.nn.Parameter | None = None
        self.bias: torch.nn.Parameter | None = None
        if self.gate.takes_logits:
            self.weight = torch.nn.Parameter(torch.empty(experts, hidden_size, dtype=dtype, device=device))
            torch.nn.init.normal_(self.weight, std=0.02 * moe.moe_router_init_scale)
            if moe.moe_router_bias:
                self.bias = torch.nn.Parameter(torch.zeros(experts, dtype=dtype, device=device))
        biased = moe.moe_router_enable_expert_bias
        self.register_buffer("expert_bias", torch.zeros(experts, device=device) if biased else None)
        self.balancing = Balancing(moe).to(device)
        self.loss_scale: Scale = unscaled
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
        draws = Draws(microbatch, self.seed, self.layer_number)
        tokens = self._jittered(hidden.reshape(-1, width).to(self.dtype), draws)
        logits = self._logits(tokens)
        given = GateInput(tokens, self._normalized(logits), microbatch, self.expert_bias, draws)
        choice: Choice = self.gate(given)
        if self.moe.moe_router_topk_scaling_factor is not None:
            choice = replace(choice, weights=choice.weights * self.moe.moe_router_topk_scaling_factor)
        # Recompute runs this twice, first without gradients; evaluation never has them.
        counts = self.training and torch.is_grad_enabled()
        if counts:
            weights = self.balancing.attach(logits, choice, microbatch, self.loss_scale)
            choice = replace(choice, weights=weights)
        routing = self.capacity.apply(choice, microbatch, self.training)
        if counts:
            self.statistics.record(logits if self.gate.takes_logits else None, choice, routing, microbatch)
        elif not self.training and self.capacity.drops(training=False):
            self.statistics.record_drops(choice, routing, microbatch)
        return routing

    def _jittered(self, tokens: Tensor, draws: Draws) -> Tensor:
        """[t, h] times random numbers from 1 - eps to 1 + eps, in training (Switch Transformer, table 2)."""
        jitter = self.moe.moe_input_jitter_eps
        if not jitter or not self.training:
            return tokens
        factors = draws.uniform("jitter", tokens.size(1)).mul_(2 * jitter).add_(1 - jitter)
        return tokens * factors.to(tokens.dtype)

    def _logits(self, tokens: Tensor) -> Tensor:
        """[t, h] -> [t, e] in the router's own precision."""
        if self.weight is None:
            return tokens.new_zeros(len(tokens), self.moe.num_moe_experts)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return F.linear(tokens, self.weight.to(self.dtype), bias)

    def _normalized(self, logits: Tensor) -> Tensor:
        """What the gate gets; the z-loss and the statistics take the logits as they are."""
        factor = self.moe.moe_router_logit_normalization
        if factor is None:
            return logits
        return normalized(logits, factor, self.moe.moe_router_logit_normalization_epsilon)

    @torch.no_grad()
    def end_iteration(self, load: Tensor, drop_rate: float | None) -> None:
        """Go on to the next iteration: move coefficients and expert biases. To be called once after each
        update of the weights, on every rank with the same numbers. The biases of a frozen router stay: they
        are a part of how it chooses. Coefficients are of losses, which others learn from.

        Args:
            load: [e] assignments of valid tokens to each expert over the global batch, before drops.
            drop_rate: what adaptive coefficients follow, over the global batch; None where no token was
                routed.
        """
        if self.expert_bias is not None and (self.weight is None or self.weight.requires_grad):
            # DeepSeek-V3, section 2.1.2: down where overloaded, up where under.
            missing = load.mean() - load
            self.expert_bias += self.moe.moe_router_bias_update_rate * missing.sign().to(self.expert_bias)
        self.balancing.end_iteration(load, drop_rate)
