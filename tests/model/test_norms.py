"""The norms against their formulas in float64, and what they tell Megatron-Core."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_moe.model.norms import Norm


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def norm(kind: str, dtype: torch.dtype = torch.float64, sequence_parallel: bool = False) -> Norm:
    config = SimpleNamespace(normalization=kind, params_dtype=dtype, sequence_parallel=sequence_parallel)
    module = Norm(config, 8, eps=1e-3)
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data = torch.randn(8, generator=generator, dtype=torch.float64).to(dtype)
    return module


def by_formula(kind: str, x: Tensor, module: Norm) -> Tensor:
    if kind == "LayerNorm":
        assert module.bias is not None
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * module.weight + module.bias
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * module.weight


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_values_and_gradients(kind: str) -> None:
    module = norm(kind)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 2, 8, dtype=torch.float64)
    leaves = [x, *module.parameters()]
    output, exact = module(x), by_formula(kind, x, module)
    torch.testing.assert_close(output, exact)
    for mine, other in zip(
        torch.autograd.grad(output, leaves, upstream),
        torch.autograd.grad(exact, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16_weights(kind: str, residual: torch.dtype) -> None:
    """The residual stream may be kept in float32; what leaves the norm has the weights' dtype."""
    module = norm(kind, torch.bfloat16)
    x = (100 * torch.randn(4, 8)).to(residual)
    output = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), by_formula(kind, x.double(), module), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_carry_the_mark(kind: str, sequence_parallel: bool) -> None:
    """Without it Megatron-Core would not sum their gradients over the ranks that each saw a part of the
    sequence."""
    parameters = list(norm(kind, sequence_parallel=sequence_parallel).parameters())
    assert len(parameters) == {"RMSNorm": 1, "LayerNorm": 2}[kind]
    assert all(getattr(p, "sequence_parallel") is sequence_parallel for p in parameters)  # noqa: B009
