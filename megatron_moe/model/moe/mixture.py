"""Several gates over one set of experts (MMoE)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.dispatch.local import Local
from megatron_moe.model.moe.layer import Mixture
from megatron_moe.model.moe.library_router import Statistics
from megatron_moe.model.moe.permutation import sort_by_expert, to_experts, to_tokens
from megatron_moe.model.moe.routing import Routing, dense_map


class MultiGateMixture(Mixture):
    """y_k = sum_i g_ki(x) f_i(x) for each gate k, the experts f shared by all (MMoE, Ma et al. 2018, eqs. 6
    and 7). With topk = num_experts and pre-softmax these are the dense gates of the paper; towers are the
    caller's.

    An expert computes a token once, whichever gates chose it. Spread over ranks, each gate's tokens travel by
    themselves.

    Args: see `layer.MixtureOfExperts`; and
        num_gates: one for each task.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_gates: int,
        gate: Callable[..., torch.nn.Module] | None = None,
        attach_losses: bool = True,
        layer_number: int = 1,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        if num_gates < 1:
            raise InputError(f"num_gates: {num_gates} is too few; give one for each task, at least 1")
        super().__init__(hidden_size, **arguments)
        if self.moe.moe_pad_expert_input_to_capacity:
            raise InputError(
                "moe_pad_expert_input_to_capacity: has no effect where gates share experts; leave it out"
            )
        self.gates = torch.nn.ModuleList(
            self.make_router(gate, is_attached=attach_losses, layer_number=layer_number, seed=seed + task)
            for task in range(num_gates)
        )

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> list[Tensor]:
        """[.., h] -> for each gate [.., h]."""
        hidden, marks = self.sequences(x), self.marks(x, *self.tokens_given(padding_mask, token_ids))
        tokens = self.into_experts(hidden.reshape(-1, self.hidden_size))
        routings = [router(hidden, marks) for router in self.gates]
        if isinstance(self.dispatcher, Local):
            outputs = self._together(tokens, routings)
        else:
            outputs = [self.through_experts(tokens, routing) for routing in routings]
        return [self.back(output, x).to(x.dtype) for output in outputs]

    def statistics(self) -> list[Statistics]:
        """What each gate did on this rank since the iteration began."""
        return [router.read() for router in self.routers]

    def _together(self, tokens: Tensor, routings: list[Routing]) -> list[Tensor]:
        """Each expert computes the tokens that any gate sends to it; then every gate weighs the results."""
        experts = self.moe.num_moe_experts
        chosen = torch.stack([dense_map(r.experts, r.kept, experts) for r in routings]).any(0)
        everyone = torch.arange(experts, device=tokens.device).expand_as(chosen)
        permutation = sort_by_expert(everyone, chosen, experts)
        rows = to_experts(tokens, permutation)
        with self.autocast_of_experts(tokens):
            outputs, _ = self.experts(rows, permutation.counts, rows.new_ones(len(rows)))
            shared = 0 if self.shared is None else self.shared(tokens)
        results = []
        for routing in routings:
            weights, _ = replace(routing, capacity=None).dense(experts)
            of_rows = weights.reshape(-1).index_select(0, permutation.assignments)
            results.append(
                to_tokens((outputs * of_rows.unsqueeze(-1)).to(outputs.dtype), permutation) + shared
            )
        return results
