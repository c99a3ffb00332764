"""Each balancing loss is its paper's formula: value and gradient, in float64."""

from __future__ import annotations

from dataclasses import replace

import loss_formulas as formulas
import numpy as np
import pytest
import torch
from loss_formulas import FORMULAS, Routed
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.draws import Draws
from megatron_moe.model.moe.gates.gate import Choice, GateInput
from megatron_moe.model.moe.gates.topk import TopK
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.losses import LOSSES
from megatron_moe.model.moe.losses.loss import LossInput
from megatron_moe.model.moe.losses.z_loss import z_loss
from megatron_moe.model.moe.microbatch import Microbatch

S, B, E, K = 5, 3, 6, 2
PREVIOUS = np.array([7.0, 1.0, 4.0, 0.0, 2.0, 6.0])


def logits() -> Tensor:
    return torch.randn(S, B, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def padding() -> Tensor:
    """[s, b]: the sequences end at different places, one has no token at all."""
    return torch.arange(S)[:, None] >= torch.tensor([5, 2, 0])


def given(z: Tensor, mask: Tensor | None, **settings: object) -> LossInput:
    """What the losses of one microbatch see."""
    moe = MoE.model_validate(
        {"num_moe_experts": E, "moe_router_topk": K, "moe_num_device_groups": 3, **settings}
    )
    microbatch = Microbatch(S, B, MoEGroups(), mask)
    flat = z.flatten(0, 1)
    choice: Choice = TopK(moe, 1)(GateInput(flat, flat, microbatch, None, Draws(microbatch, 0, 1)))
    previous = torch.from_numpy(PREVIOUS / PREVIOUS.sum())
    return LossInput(flat, replace(choice, load=flat.sigmoid()), microbatch, moe, previous)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", [*FORMULAS, "z_loss"])
def test_value_and_gradient(name: str, padded: bool, score: str) -> None:
    mask = padding() if padded else None
    z = logits().requires_grad_()
    seen = given(z, mask, moe_router_score_function=score)
    loss = {**LOSSES, "z_loss": z_loss}[name](seen)
    loss.backward()

    valid = np.ones((S, B), dtype=bool) if mask is None else ~mask.numpy()
    experts = seen.choice.experts.view(S, B, K).numpy()
    reference = Routed(logits().numpy(), experts, valid, sigmoid=score == "sigmoid", previous=PREVIOUS)
    formula = {**FORMULAS, "z_loss": formulas.z}[name]
    assert float(loss.detach()) == pytest.approx(formula(reference), rel=1e-12)
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), formulas.gradient(formula, reference), rtol=1e-6, atol=1e-9)
    assert float(z.grad.abs().max()) > 1e-4


def test_every_loss_has_a_formula() -> None:
    assert LOSSES.keys() == FORMULAS.keys()


BALANCED = {
    "aux_loss": 1,
    "seq_aux_loss": 1,
    "global_aux_loss": 1,
    "skywork_aux_loss": 0,
    "gshard_aux_loss": 1 / E**2,
    "importance_loss": 0,
    "load_loss": 0,
    "device_aux_loss": 1,
}


@pytest.mark.parametrize("name", BALANCED)
def test_value_at_perfect_balance(name: str) -> None:
    """E tokens, token i for experts i and i + 1 alike."""
    z = torch.zeros(E, 1, E, dtype=torch.float64)
    for token in range(E):
        z[token, 0, token], z[token, 0, (token + 1) % E] = 1.01, 1.0
    moe = MoE(num_moe_experts=E, moe_router_topk=K, moe_num_device_groups=3)
    microbatch, flat = Microbatch(E, 1, MoEGroups()), z.flatten(0, 1)
    choice = TopK(moe, 1)(GateInput(flat, flat, microbatch, None, Draws(microbatch, 0, 1)))
    even = torch.full((E,), 1 / E, dtype=torch.float64)
    value = LOSSES[name](LossInput(flat, replace(choice, load=flat.exp()), microbatch, moe, even))
    assert float(value) == pytest.approx(BALANCED[name], abs=1e-12)


def test_where_routing_is_limited_to_other_groups_a_token_may_reach_as_many_as_it_has_choices() -> None:
    """M of the communication loss."""
    z = logits()
    for settings, most in (
        ({"moe_num_device_groups": 3, "moe_router_topk": 2}, 2),
        ({"moe_num_device_groups": 2, "moe_router_topk": 3}, 2),
        ({"moe_num_device_groups": 3, "moe_router_num_groups": 3, "moe_router_group_topk": 1}, 1),
        ({"moe_num_device_groups": 2, "moe_router_num_groups": 3, "moe_router_group_topk": 1}, 2),
    ):
        seen = given(z, None, **settings)
        experts = seen.choice.experts.view(S, B, -1).numpy()
        groups = int(settings["moe_num_device_groups"])
        reference = Routed(z.numpy(), experts, np.ones((S, B), dtype=bool), groups=groups, most_groups=most)
        value = LOSSES["communication_aux_loss"](seen)
        assert float(value) == pytest.approx(formulas.communication(reference), rel=1e-12)


@pytest.mark.parametrize("name", [*LOSSES, "z_loss"])
def test_padding_alone_costs_nothing(name: str) -> None:
    z = logits().requires_grad_()
    loss = {**LOSSES, "z_loss": z_loss}[name](given(z, torch.ones(S, B, dtype=torch.bool)))
    loss.backward()
    assert z.grad is not None and not z.grad.any() and bool(loss.isfinite())


@pytest.mark.parametrize("name", ["importance_loss", "aux_loss", "communication_aux_loss", "gshard_aux_loss"])
def test_a_choice_that_was_not_made_does_not_count(name: str) -> None:
    """The second choice of every token is left out: the losses see one expert a token."""
    seen = given(logits(), None)
    made = torch.tensor([True, False]).expand(S * B, K)
    one = replace(seen.choice, experts=seen.choice.experts[:, :1], weights=seen.choice.weights[:, :1])
    without = LOSSES[name](replace(seen, choice=replace(seen.choice, chosen=made)))
    expected = LOSSES[name](replace(seen, choice=one))
    assert float(without) == pytest.approx(float(expected), rel=1e-12)


def test_a_load_loss_without_noise_says_what_it_needs() -> None:
    seen = given(logits(), None)
    with pytest.raises(
        ValueError, match=r"load_loss needs a gate that gives Choice\.load, such as noisy_topk"
    ):
        LOSSES["load_loss"](replace(seen, choice=replace(seen.choice, load=None)))
