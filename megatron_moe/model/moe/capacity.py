"""Which assignments an expert of limited capacity keeps, the same in every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
