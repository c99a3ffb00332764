"""Several gates over one set of experts against the formula of MMoE."""

from __future__ import annotations

import mixtures_on_ranks as on_ranks
import pytest
import torch
from distributed import ranks
from torch import nn

import megatron_moe
from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.mixture import MultiGateMixture

WIDTH, GATES = 16, 3


@pytest.mark.parametrize("topk", [4, 2], ids=["dense gates", "sparse gates"])
def test_each_gate_mixes_the_same_experts(topk: int) -> None:
    """y_k = sum_i softmax(W_gk x)_i f_i(x), values and gradients, in float64."""
    experts = [on_ranks.Own().double() for _ in range(4)]
    given = iter(experts)
    mixture = MultiGateMixture(
        WIDTH,
        num_gates=GATES,
        num_experts=4,
        topk=topk,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp64",
        moe_aux_loss_coeff=0.0,
        expert=lambda: next(given),
        dtype=torch.float64,
    )
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    outputs = torch.stack([expert(x) for expert in experts], dim=-2)
    expected = []
    for router in mixture.routers:
        weights = (x @ router.weight.T).softmax(-1)
        weights = weights * (weights >= weights.topk(topk, dim=-1).values[..., -1:])
        expected.append((weights.unsqueeze(-1) * outputs).sum(-2))
    actual = mixture(x)
    torch.testing.assert_close(actual, expected)
    towers = [nn.Linear(WIDTH, 2).double() for _ in range(GATES)]
    leaves = [x, *mixture.parameters()]
    losses = [
        sum(tower(y).square().sum() for tower, y in zip(towers, ys, strict=True))  # type: ignore[misc]
        for ys in (actual, expected)
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


def test_no_gate_is_refused() -> None:
    with pytest.raises(InputError, match="num_gates: 0 is too few"):
        megatron_moe.MultiGateMixture(4, num_gates=0, num_experts=2)


def test_an_expert_computes_a_token_once() -> None:
    rows = []

    class Counted(on_ranks.Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows.append(len(x))
            return super().forward(x)

    mixture = MultiGateMixture(
        WIDTH, num_gates=GATES, num_experts=4, topk=4, moe_router_pre_softmax=True, expert=Counted
    )
    mixture(torch.randn(7, WIDTH))
    assert rows == [7] * 4
    assert [seen.load for seen in mixture.statistics()] == [[7] * 4] * GATES
    assert list(megatron_moe.statistics(mixture)) == ["gates.0", "gates.1", "gates.2"]
    megatron_moe.end_iteration(mixture)


def test_spread_over_ranks_it_is_the_same() -> None:
    torch.manual_seed(3)
    alone = MultiGateMixture(WIDTH, num_gates=2, num_experts=4)
    for rank, outputs in enumerate(ranks(2).run(on_ranks.many_gates)):
        torch.testing.assert_close(outputs, [y.detach() for y in alone(on_ranks.data(rank))])
