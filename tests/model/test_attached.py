"""A loss that rides on an activation: the gradient of the sum of both, scaled as the main loss is."""

from __future__ import annotations

import pytest
import torch
from experiments import MOE

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.attached import attach
from megatron_moe.model.moe.router import Router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor([512.0])])
def test_the_gradient_is_that_of_the_sum(dtype: torch.dtype, scale: float | torch.Tensor) -> None:
    weight = torch.tensor([0.5, -2.0], requires_grad=True)
    activation = (weight * 3).to(dtype)
    attached = attach(activation, (weight**3).sum(), lambda: scale)
    assert attached.dtype == dtype and torch.equal(attached, activation)
    attached.sum().backward()
    factor = float(scale)
    assert weight.grad is not None
    assert weight.grad.tolist() == [3 + factor * 3 * 0.25, 3 + factor * 3 * 4.0]


def test_the_scale_is_asked_in_the_backward_pass() -> None:
    weight, scale = torch.ones(1, requires_grad=True), [1.0]
    attached = attach(torch.zeros(1, requires_grad=True), weight.sum(), lambda: scale[0])
    scale[0] = 7.0
    attached.sum().backward()
    assert weight.grad is not None and float(weight.grad) == 7.0


def test_what_learns_nothing_is_left_as_it_is() -> None:
    activation = torch.ones(2, requires_grad=True)
    assert attach(activation, torch.tensor(3.0)) is activation


def gradient(router: Router, batches: list[torch.Tensor]) -> torch.Tensor:
    """Of the losses alone, accumulated."""
    assert router.weight is not None
    router.weight.grad = None
    for batch in batches:
        (router(batch).weights * 0).sum().backward()
    assert router.weight.grad is not None
    return router.weight.grad


def test_a_router_by_itself_does_not_follow_megatron_cores_schedule() -> None:
    """Which may have set its scale in the same process; a program of one's own says how it scales its
    loss."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    moe = MoE.model_validate(
        {**MOE, "moe_router_load_balancing_type": "seq_aux_loss", "moe_z_loss_coeff": 1.0}
    )
    router = Router(moe, 8)
    batch = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1))
    whole = gradient(router, [batch])
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 100.0))
    assert torch.equal(gradient(router, [batch]), whole) and float(whole.norm()) > 0

    router.loss_scale = lambda: 1 / 4
    accumulated = gradient(router, list(batch.chunk(4, dim=1)))
    torch.testing.assert_close(accumulated, whole, rtol=1e-5, atol=1e-7)
