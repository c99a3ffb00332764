"""Experts that compute equally many rows: nothing changes but that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.capacity import Capacity
from megatron_moe.model.moe.dispatch.local import Local
from megatron_moe.model.moe.filled import filled
from megatron_moe.model.moe.gates.gate import Choice
from megatron_moe.model.moe.grouped_linear import grouped_linear
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.microbatch import Microbatch
from megatron_moe.model.moe.routing import Padded

T, E, K, H = 24, 4, 2, 8


class OneMatrix(torch.nn.Module):
    """Experts of one matrix each, which remember how many rows they computed."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())
        self.rows: list[int] = []

    def forward(self, tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        self.rows = counts.tolist()
        return grouped_linear(tokens, self.weight, counts) * weights[:, None], None


def passed(fill: bool, factor: Any, padding: Tensor | None = None) -> tuple[list[Tensor], list[int]]:
    """Output, gradients of tokens, gate weights and experts; and the rows of each expert."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(T, H, generator=generator).requires_grad_()
    logits = torch.randn(T, E, generator=generator)
    logits[:, 0] += 1.0
    logits[:, 3] -= 9.0  # no token goes there
    values, experts = logits.topk(K)
    weights = values.softmax(-1).requires_grad_()
    moe = MoE(
        num_moe_experts=E,
        moe_router_topk=K,
        moe_expert_capacity_factor=factor,
        moe_pad_expert_input_to_capacity=fill,
    )
    marks = None if padding is None else padding[:, None]
    microbatch = Microbatch(T, 1, MoEGroups(), marks, torch.device("cpu"))
    routing = Capacity(moe).apply(Choice(experts, weights, logits.softmax(-1)), microbatch, training=True)
    module = OneMatrix(torch.randn(E, H, H, generator=generator))
    output = Local(E)(tokens, routing, filled(module, routing.capacity))
    (output * torch.randn(T, H, generator=generator)).sum().backward()
    assert tokens.grad is not None and weights.grad is not None and module.weight.grad is not None
    return [output.detach(), tokens.grad, weights.grad, module.weight.grad], module.rows


@pytest.mark.parametrize(
    ("factor", "padding", "rows"),
    [
        (0.75, None, 9),  # ceil(24 * 2 / 4 * 0.75)
        (1e9, None, T),
        (0.75, torch.arange(T) >= 12, None),
        ("auto", None, None),
        (0, None, None),
        (-0.75, None, 9),  # experts 0, 1 and 2 are all overfull
    ],
)
def test_nothing_changes_but_the_rows(factor: Any, padding: Tensor | None, rows: int | None) -> None:
    """Without a number: as many as the fullest expert has, who may have marked tokens on top."""
    expected, needed = passed(False, factor, padding)
    actual, computed = passed(True, factor, padding)
    assert needed[3] == 0 and len(set(needed)) > 1
    assert computed == [max(needed) if rows is None else rows] * E
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_more_than_the_capacity_where_marked_tokens_come_on_top() -> None:
    """Six tokens, all for expert 0, five of them marked: its capacity is that of one token."""
    module = OneMatrix(torch.randn(2, H, H))
    counts, weights = torch.tensor([6, 0]), torch.ones(6)
    output, _ = filled(module, Padded(1, at_least=True))(torch.randn(6, H), counts, weights)
    assert module.rows == [6, 6] and output.shape == (6, H)


def test_no_token_at_all() -> None:
    for capacity in (Padded(0, at_least=True), Padded(3)):
        module = OneMatrix(torch.randn(2, H, H))
        tokens = torch.zeros(0, H, requires_grad=True)
        output, _ = filled(module, capacity)(tokens, torch.zeros(2, dtype=torch.int64), torch.zeros(0))
        output.sum().backward()
        assert output.shape == (0, H) and module.rows == [capacity.rows] * 2
        assert module.weight.grad is not None and not bool(module.weight.grad.any())
