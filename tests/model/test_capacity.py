"""Which assignments are dropped, against loops, against Megatron-Core, and in the order of one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_moe.model.moe.capacity import sequence_order, within_capacity


def routing(tokens: int, experts: int, topk: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, experts, generator=generator)
    logits[:, 0] += 1.0
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(topk).indices, 1.0).bool()
    probs = logits.masked_fill(~chosen, -math.inf).softmax(-1)
    return (probs.round(decimals=1) if ties else probs) * chosen, chosen


def by_loop(
    probs: Tensor, routed: Tensor, valid: Tensor, topk: int, factor: float, policy: str
) -> list[list[bool]]:
    """Each expert lets its tokens in one after the other until it is full."""
    capacity = math.ceil(int(valid.sum()) * topk / routed.size(1) * factor)
    kept = [[bool(routed[t, e]) for e in range(routed.size(1))] for t in range(len(routed))]
    for expert in range(routed.size(1)):
        tokens = [t for t in range(len(routed)) if routed[t, expert] and valid[t]]
        if policy == "probs":
            tokens.sort(key=lambda t: -float(probs[t, expert]))
        for token in tokens[capacity:]:
            kept[token][expert] = False
    return kept


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25, 8.0, 1e300])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_against_a_loop(policy: str, factor: float, padded: bool, ties: bool) -> None:
    probs, routed = routing(37, 5, 2, ties)
    valid = torch.arange(37) % 3 > 0 if padded else torch.ones(37, dtype=torch.bool)
    kept = within_capacity(probs, routed, valid if padded else None, 2, factor, policy)
    assert kept.tolist() == by_loop(probs, routed, valid, 2, factor, policy)


def test_padding_is_never_dropped_and_takes_no_room() -> None:
    probs, routed = routing(40, 4, 2)
    valid = torch.arange(40) < 25
    kept = within_capacity(probs, routed, valid, 2, 1.0, "position")
    alone = within_capacity(probs[:25], routed[:25], None, 2, 1.0, "position")
    assert torch.equal(kept[:25], alone)
    assert torch.equal(kept[25:], routed[25:])


def test_only_padding() -> None:
    probs, routed = routing(8, 4, 2)
    assert torch.equal(
        within_capacity(probs, routed, torch.zeros(8, dtype=torch.bool), 2, 1.0, "probs"), routed
    )


@pytest.mark.second_pair
def test_keeps_what_megatron_core_keeps() -> None:
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    probs, routed = routing(64, 8, 2)
    for factor in (0.5, 1.0, 1.5):
        theirs = apply_router_token_dropping(probs, routed, 2, factor, drop_policy="probs")[1]
        assert torch.equal(within_capacity(probs, routed, None, 2, factor, "probs"), theirs.bool())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_order_of_the_sequence(tp: int, cp: int) -> None:
    """Cut a microbatch as Megatron-Core cuts it, put the ranks' tokens one after the other, order them
    again."""
    s, b = 16 * tp, 3
    tokens = torch.arange(s * b).view(s, b)
    chunks = tokens.chunk(2 * cp)
    parts: list[Tensor] = []
    for rank in range(cp):
        mine = torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]]) if cp > 1 else tokens
        parts += mine.chunk(tp)
    gathered = torch.cat([part.flatten() for part in parts])
    order = sequence_order(tp, cp, s // (tp * cp), b, torch.device("cpu"))
    assert torch.equal(order, gathered)
