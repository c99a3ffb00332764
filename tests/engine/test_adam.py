"""The optimizer's arithmetic is torch's, its state has the shape that Megatron-Core's checkpoints expect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megatron_moe.engine.adam import FusedAdam

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (1, 17, 4096)]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize(
    "fused", [True, pytest.param(False, id="reference")], ids=lambda fused: f"fused={fused}"
)
def test_steps_as_torchs_adamw(fused: bool) -> None:
    ours, theirs = parameters(), parameters()
    adam, reference = FusedAdam(ours, **SETTINGS), torch.optim.AdamW(theirs, fused=fused, **SETTINGS)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        adam.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        if fused:
            assert torch.equal(mine, other)
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-7)


def test_follows_the_paper_in_float64() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, for one weight."""
    weight = torch.nn.Parameter(torch.tensor([0.5]))
    adam = FusedAdam([weight], **SETTINGS)
    lr, (beta1, beta2), eps, decay = (SETTINGS[key] for key in ("lr", "betas", "eps", "weight_decay"))
    expected, first, second = 0.5, 0.0, 0.0
    for step, gradient in enumerate((0.3, -0.1, 0.7), start=1):
        weight.grad = torch.tensor([gradient])
        adam.step()
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)) ** 0.5 + eps)
        expected -= lr * (update + decay * expected)
    assert float(weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_a_parameter_without_gradient_stays() -> None:
    params = parameters()
    adam = FusedAdam(params, **SETTINGS)
    give_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    adam.step()
    assert torch.equal(params[1], before)
    assert params[1] not in adam.state


def test_state_has_the_layout_of_megatron_cores_optimizers() -> None:
    params = parameters()
    adam = FusedAdam([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], **SETTINGS)
    for step in range(2):
        give_gradients(params, step)
        adam.step()
    state = adam.state_dict()
    assert [group["step"] for group in state["param_groups"]] == [2, 2]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    assert {frozenset(entry) for entry in state["state"].values()} == {frozenset({"exp_avg", "exp_avg_sq"})}
    assert [state["state"][i]["exp_avg"].shape for i in range(3)] == [p.shape for p in params]


def test_goes_on_from_a_saved_state() -> None:
    params = parameters()
    adam = FusedAdam(params, **SETTINGS)
    for step in range(3):
        give_gradients(params, step)
        adam.step()
    saved, weights = copy.deepcopy(adam.state_dict()), [p.detach().clone() for p in params]
    give_gradients(params, 3)
    adam.step()

    resumed = [torch.nn.Parameter(weight) for weight in weights]
    again = FusedAdam(resumed, lr=1.0)
    again.load_state_dict(saved)
    give_gradients(resumed, 3)
    again.step()
    for mine, other in zip(resumed, params, strict=True):
        assert torch.equal(mine, other)
