"""Which assignments an expert of limited capacity keeps, the same in every layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.routing import Routing, dense_map

if TYPE_CHECKING:
    from megatron_moe.model.moe.gates.gate import Choice
    from megatron_moe.model.moe.microbatch import Microbatch


class Capacity:
    """Turns a gate's choice into what is kept of it.

    Args:
        moe: the settings.
    """

    def __init__(self, moe: MoE) -> None:
        self.moe = moe

    @torch.no_grad()
    def kept(self, choice: Choice, microbatch: Microbatch) -> Tensor | None:
        """[t, k] bool: the assignments that their expert has room for; None: all."""
        factor = self.moe.moe_expert_capacity_factor
        if factor is None:
            return choice.chosen
        assert isinstance(factor, float | int)
        experts, whole = choice.experts, self.moe.num_moe_experts
        weights = choice.weights.new_zeros(len(experts), whole).scatter(1, experts, choice.weights)
        kept = within_capacity(
            microbatch.gather(weights),
            microbatch.gather(dense_map(experts, choice.chosen, whole)),
            None if microbatch.valid is None else microbatch.gather(microbatch.valid),
            self.moe.moe_router_topk,
            factor,
            self.moe.moe_token_drop_policy,
        )
        return microbatch.mine(kept).gather(1, experts)

    def apply(self, choice: Choice, microbatch: Microbatch, training: bool) -> Routing:
        """The routing of this rank's tokens, decided over the whole microbatch."""
        kept = self.kept(choice, microbatch)
        weights = choice.weights if kept is None else choice.weights * kept
        return Routing(choice.experts, weights, kept)


def within_capacity(
    probs: Tensor, routed: Tensor, valid: Tensor | None, topk: int, factor: float, policy: str
) -> Tensor:
    """[t, e] bool: the assignments in `routed` that their expert has room for.

    An expert takes ceil(t * k / e * factor) of the t valid tokens. Tokens that are not valid are left out of
    the account: they take no room, and are never dropped (a prompt that is no target must still pass its
    experts).

    Args:
        probs: [t, e] gate weights.
        routed: [t, e] bool, experts chosen for each token, in the order of the sequence.
        valid: [t] bool, false for padding; None: every token is valid.
        topk: k.
        policy: `probs` drops the smallest gate weights, of equal ones the later; `position` drops the last
            tokens.
    """
    contending = routed if valid is None else routed & valid[:, None]
    tokens = routed.size(0) if valid is None else int(valid.sum())
    # None can get more than all tokens, however large the factor.
    capacity = math.ceil(min(tokens, tokens * topk / routed.size(1) * factor))
    if policy == "probs":
        order = probs.masked_fill(~contending, -1.0).argsort(dim=0, descending=True, stable=True)
        ranks = torch.arange(1, len(order) + 1, device=order.device)[:, None].expand_as(order)
        places = torch.empty_like(order).scatter_(0, order, ranks)
    else:
        places = contending.cumsum(dim=0)
    return routed & ~(contending & (places > capacity))


def sequence_order(
    tensor_size: int, context_size: int, length: int, batch: int, device: torch.device
) -> Tensor:
    """[TP * CP * s * b]: where in one process's order of tokens those stand that the ranks of a TP x CP group
    hold one after the other.

    The group's ranks count TP first. Each CP rank holds chunks r and 2 CP - 1 - r of the sequence
    (Megatron-Core's zig-zag split), and its TP ranks equal parts of these (sequence parallelism).

    Args:
        length: s, places of the sequence on one rank.
        batch: b.
    """
    local = torch.arange(tensor_size * length, device=device)
    positions = local
    if context_size > 1:
        chunk = tensor_size * length // 2
        rank = torch.arange(context_size, device=device)[:, None]
        first, second = local[:chunk] + rank * chunk, local[:chunk] + (2 * context_size - 1 - rank) * chunk
        positions = torch.cat([first, second], dim=1).flatten()
    return (positions[:, None] * batch + torch.arange(batch, device=device)).flatten()
