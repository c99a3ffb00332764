"""Gating-logit normalization against its formula in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_moe.model.moe.normalization import normalized


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_by_formula(factor: float) -> None:
    """lambda * (z - mean) / (std + epsilon) (Skywork-MoE, eq. 6), and its derivative written out:
    with c = z - mean, s = std and n experts, d out_i / d z_j is
    lambda * ((delta_ij - 1/n) / (s + eps) - c_i c_j / ((n - 1) s (s + eps)^2))."""
    epsilon, experts = 1e-2, 6
    rng = np.random.default_rng(0)
    z, upstream = rng.normal(size=(5, experts)) * 3 + 1, rng.normal(size=(5, experts))
    x = torch.from_numpy(z).requires_grad_()
    actual = normalized(x, factor, epsilon)
    (actual * torch.from_numpy(upstream)).sum().backward()
    assert x.grad is not None
    for row, slope, gradient, result in zip(
        z, upstream, x.grad.numpy(), actual.detach().numpy(), strict=True
    ):
        centered, std = row - row.mean(), row.std(ddof=1)
        np.testing.assert_allclose(result, factor * centered / (std + epsilon), rtol=1e-12)
        derivative = (np.eye(experts) - 1 / experts) / (std + epsilon)
        derivative -= np.outer(centered, centered) / ((experts - 1) * std * (std + epsilon) ** 2)
        np.testing.assert_allclose(gradient, factor * slope @ derivative, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_stay_equal_and_have_a_gradient(value: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 7), value, dtype=dtype, requires_grad=True)
    actual = normalized(x, 1.0, 1e-6)
    assert (actual == actual[:, :1]).all() and actual.isfinite().all()
    actual[:, 0].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()


def test_scale_and_offset_of_the_logits_do_not_matter() -> None:
    z = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalized(z * 30 - 5, 1.0, 1e-12), normalized(z, 1.0, 1e-12))
