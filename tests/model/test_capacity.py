"""Which assignments are dropped: against loops, by hand, and in the order of one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.capacity import Capacity, replicas_reached
from megatron_moe.model.moe.gates.gate import Choice
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.microbatch import Microbatch, sequence_order
from megatron_moe.model.moe.routing import Padded, Routing

POLICIES = ["probs", "position", "batch_priority"]


def choices(tokens: int, experts: int, topk: int, ties: bool = False, **more: Any) -> Choice:
    """Top-k with a favourite expert, so that some overflow."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, experts, generator=generator)
    logits[:, 0] += 1.0
    values, chosen = logits.topk(topk)
    weights = values.softmax(-1)
    return Choice(chosen, weights.round(decimals=1) if ties else weights, logits.softmax(-1), **more)


def microbatch(tokens: int, padding: Tensor | None = None) -> Microbatch:
    marks = None if padding is None else padding[:, None]
    return Microbatch(tokens, 1, MoEGroups(), marks, torch.device("cpu"))


def settings(experts: int, topk: int, factor: Any, policy: str = "probs", **more: Any) -> MoE:
    return MoE(
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_expert_capacity_factor=factor,
        moe_token_drop_policy=policy,
        **more,
    )


def by_loop(
    choice: Choice, padding: Tensor, factor: float, policy: str, num_experts: int
) -> list[list[bool]]:
    """Each assignment in its turn takes a place of its expert, until there is none."""
    tokens, topk = choice.experts.shape
    weights = choice.weights.tolist()
    made = torch.ones(tokens, topk) if choice.chosen is None else choice.chosen
    capacity = math.ceil(int((~padding).sum()) * topk / num_experts * factor)

    def turn(place: tuple[int, int]) -> tuple[float, ...]:
        token, rank = place
        if policy == "batch_priority":
            return (
                rank,
                -max(w if m else 0 for w, m in zip(weights[token], made[token], strict=True)),
                token,
            )
        ahead = rank if choice.first_choices_first else 0
        return (ahead, -weights[token][rank], token) if policy == "probs" else (ahead, token)

    kept = [[bool(made[t, c]) for c in range(topk)] for t in range(tokens)]
    taken = [0] * num_experts
    contending = [(t, c) for t in range(tokens) for c in range(topk) if kept[t][c] and not padding[t]]
    for token, rank in sorted(contending, key=turn):
        expert = int(choice.experts[token, rank])
        kept[token][rank] = taken[expert] < capacity
        taken[expert] += 1
    return kept


@pytest.mark.parametrize("first", [False, True], ids=["", "first choices first"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25, 8.0, 1e300])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_against_a_loop(policy: str, factor: float, ties: bool, first: bool) -> None:
    for topk, padding in ((1, torch.zeros(37)), (3, torch.arange(37) % 3 == 0), (5, torch.zeros(37))):
        padding = padding.bool()
        made = torch.arange(37 * topk).view(37, topk) % 4 > 0
        for chosen in (None, made):
            choice = choices(37, 5, topk, ties, chosen=chosen, first_choices_first=first)
            capacity = Capacity(settings(5, topk, factor, policy))
            routing = capacity.apply(
                choice, microbatch(37, padding if padding.any() else None), training=True
            )
            expected = by_loop(choice, padding, factor, policy, 5)
            assert routing.kept is not None and routing.kept.tolist() == expected
            assert torch.equal(routing.weights, choice.weights * routing.kept)


def test_drops_by_hand() -> None:
    """Four tokens, two experts, top-1, factor 1: an expert has room for two. Three want expert 0."""
    experts, weights = torch.tensor([[0], [0], [1], [0]]), torch.tensor([[0.6], [0.9], [0.7], [0.8]])
    choice = Choice(experts, weights, torch.zeros(4, 2))
    lost = {"probs": 0, "batch_priority": 0, "position": 3}
    for policy, token in lost.items():
        routing = Capacity(settings(2, 1, 1.0, policy)).apply(choice, microbatch(4), training=True)
        assert routing.kept is not None
        assert [row for row in range(4) if not routing.kept[row, 0]] == [token]
        assert float(routing.weights[token, 0]) == 0.0


def test_second_choices_wait_where_the_gate_asks_for_it() -> None:
    """Expert 0 has room for two: the weighty second choice of token 0 goes ahead by weight, and waits for
    the first choices of tokens 1 and 2 in GShard's and in V-MoE's order."""
    experts = torch.tensor([[1, 0], [0, 2], [0, 3], [3, 2]])
    weights = torch.tensor([[0.51, 0.49], [0.4, 0.3], [0.45, 0.3], [0.9, 0.1]])
    by_weight = Choice(experts, weights, torch.zeros(4, 4))
    gshard = Choice(experts, weights, torch.zeros(4, 4), first_choices_first=True)

    def lost(choice: Choice, policy: str) -> list[list[int]]:
        kept = Capacity(settings(4, 2, 1.0, policy)).apply(choice, microbatch(4), training=True).kept
        assert kept is not None
        return (~kept).nonzero().tolist()

    assert lost(by_weight, "probs") == [[1, 0]]
    assert lost(by_weight, "position") == [[2, 0]]
    assert lost(gshard, "probs") == lost(gshard, "position") == [[0, 1]]
    assert lost(by_weight, "batch_priority") == [[0, 1]]


def test_batch_priority_goes_by_the_largest_weight() -> None:
    """All want expert 0 first and expert 1 second; the token that is surest of its first choice keeps both,
    whatever its second weight."""
    experts = torch.tensor([[0, 1]] * 4)
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.55, 0.45]])
    choice = Choice(experts, weights, torch.zeros(4, 8))
    kept = Capacity(settings(8, 2, 1.0, "batch_priority")).apply(choice, microbatch(4), True).kept
    assert kept is not None
    assert kept.tolist() == [[False, False], [True, True], [False, False], [False, False]]


def test_padding_is_never_dropped_and_takes_no_room() -> None:
    choice, padding = choices(40, 4, 2), torch.arange(40) >= 25
    capacity = Capacity(settings(4, 2, 1.0, "position"))
    kept = capacity.apply(choice, microbatch(40, padding), training=True).kept
    without = Choice(choice.experts[:25], choice.weights[:25], choice.scores[:25])
    alone = capacity.apply(without, microbatch(25), training=True).kept
    assert kept is not None and alone is not None
    assert torch.equal(kept[:25], alone)
    assert bool(kept[25:].all())


def test_only_padding() -> None:
    capacity = Capacity(settings(4, 2, 1.0))
    kept = capacity.apply(choices(8, 4, 2), microbatch(8, torch.ones(8, dtype=torch.bool)), True).kept
    assert kept is not None and bool(kept.all())


@pytest.mark.parametrize("factor", [None, "auto", 0])
def test_nothing_is_dropped(factor: Any) -> None:
    routing = Capacity(settings(4, 2, factor)).apply(choices(40, 4, 2), microbatch(40), training=True)
    assert routing.kept is None


def test_a_negative_factor_drops_what_its_magnitude_drops() -> None:
    below, above = (
        Capacity(settings(4, 2, factor)).apply(choices(40, 4, 2), microbatch(40), training=True).kept
        for factor in (-0.75, 0.75)
    )
    assert below is not None and above is not None
    assert torch.equal(below, above) and not bool(below.all())


def test_evaluation_has_a_factor_of_its_own() -> None:
    def kept(training: bool, **factors: Any) -> Tensor | None:
        moe = MoE(num_moe_experts=4, moe_router_topk=2, **factors)
        return Capacity(moe).apply(choices(40, 4, 2), microbatch(40), training).kept

    both = {"moe_expert_capacity_factor": 0.5, "moe_eval_capacity_factor": 2.0}
    in_training, in_evaluation = kept(True, **both), kept(False, **both)
    assert in_training is not None and in_evaluation is not None
    assert int(in_training.sum()) < int(in_evaluation.sum())
    one = kept(False, moe_expert_capacity_factor=0.5)
    assert one is not None and torch.equal(one, in_training)
    assert kept(False, moe_expert_capacity_factor=0.5, moe_eval_capacity_factor="auto") is None
    assert kept(True, moe_eval_capacity_factor=0.5) is None
    assert kept(False, moe_eval_capacity_factor=0.5) is not None


@pytest.mark.second_pair
def test_keeps_what_megatron_core_keeps() -> None:
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    choice = choices(64, 8, 2)
    probs, routed = Routing(choice.experts, choice.weights).dense(8)
    for factor in (0.5, 1.0, 1.5):
        theirs = apply_router_token_dropping(probs, routed, 2, factor, drop_policy="probs")[1]
        ours = Capacity(settings(8, 2, factor)).apply(choice, microbatch(64), training=True)
        assert torch.equal(ours.dense(8)[1], theirs.bool())


def test_rows_of_experts_that_are_filled_up() -> None:
    """ceil(40 * 2 / 4 * 0.75) = 15 rows; where marked tokens come on top, at least those."""

    def rows(factor: Any, padding: Tensor | None = None, **groups: Any) -> Padded | None:
        moe = settings(4, 2, factor, moe_pad_expert_input_to_capacity=True)
        parts = Microbatch(40, 1, MoEGroups(**groups), None if padding is None else padding[:, None])
        return Capacity(moe)._padded(parts, factor)

    assert rows(0.75) == Padded(15)
    assert rows(0.75, torch.arange(40) > 30) == Padded(15, at_least=True)
    assert rows("auto") == rows(0) == rows(-0.75) == Padded(0, at_least=True)
    assert rows(100.0) == Padded(40)


class Group:
    """Of so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.size = lambda: ranks


@pytest.mark.parametrize(
    ("tp", "cp", "expert_ranks", "reached"),
    [
        (1, 1, 1, 1),
        (2, 1, 2, 1),
        (4, 1, 2, 1),
        (2, 2, 4, 1),
        (1, 1, 4, 4),
        (2, 1, 8, 4),
        (2, 1, 3, 2),
        (4, 1, 6, 2),
    ],
)
def test_replicas_that_reach_an_expert(tp: int, cp: int, expert_ranks: int, reached: int) -> None:
    """Ranks of a replica, and of an expert group, are numbered one after the other."""
    groups = MoEGroups(tensor=Group(tp), context=Group(cp), expert_ranks=Group(expert_ranks))
    assert replicas_reached(groups) == reached
    most = max(
        len({rank // (tp * cp) for rank in range(start, start + expert_ranks)})
        for start in range(0, 12 * expert_ranks, expert_ranks)
    )
    assert most <= reached


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
