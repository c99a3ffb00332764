"""The grouped product against one plain product an expert in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_moe.model.moe.grouped_linear import grouped_linear

SIZES = {
    "uneven": [3, 1, 7, 2],
    "empty experts": [0, 5, 0, 8],
    "all on one": [0, 0, 13, 0],
    "no tokens": [0, 0, 0, 0],
    "one expert": [13],
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def by_loop(tokens: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    parts = tokens.split(sizes)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])


def sample(sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(sum(sizes), 6, generator=generator)
    weight = torch.randn(len(sizes), 10, 6, generator=generator)
    return tokens.to(dtype), weight.to(dtype), torch.randn(sum(sizes), 10, generator=generator).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=4 * TOLERANCE[actual.dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(sizes: list[int], dtype: torch.dtype) -> None:
    tokens, weight, upstream = sample(sizes, dtype)
    mine = [x.clone().requires_grad_() for x in (tokens, weight)]
    grouped_linear(*mine, torch.tensor(sizes)).backward(upstream)
    exact = [x.double().requires_grad_() for x in (tokens, weight)]
    expected = by_loop(*exact, sizes)
    expected.backward(upstream.double())
    close(grouped_linear(tokens, weight, torch.tensor(sizes)), expected.detach())
    for ours, theirs in zip(mine, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        close(ours.grad, theirs.grad)


def test_strides_do_not_matter() -> None:
    sizes = SIZES["uneven"]
    tokens, weight, upstream = sample(sizes, torch.float64)
    results = []
    for x, w, g in (
        (tokens, weight, upstream),
        (
            tokens.T.contiguous().T,
            weight.transpose(1, 2).contiguous().transpose(1, 2),
            upstream.T.contiguous().T,
        ),
    ):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = grouped_linear(x, w, torch.tensor(sizes))
        y.backward(g)
        results.append((y, x.grad, w.grad))
    for plain, strided in zip(*results, strict=True):
        assert plain is not None and strided is not None
        torch.testing.assert_close(strided, plain, rtol=1e-14, atol=1e-14)


def test_a_gradient_that_autograd_expanded() -> None:
    """`sum()` hands back one number for all places."""
    sizes = SIZES["uneven"]
    tokens, weight, _ = sample(sizes, torch.float64)
    weight.requires_grad_()
    grouped_linear(tokens, weight, torch.tensor(sizes)).sum().backward()
    expected = torch.stack([part.sum(0).expand(10, 6) for part in tokens.split(sizes)])
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("learns", ["tokens", "weight"])
def test_only_what_learns_gets_a_gradient(learns: str) -> None:
    tokens, weight, _ = sample(SIZES["uneven"], torch.float32)
    inputs = {"tokens": tokens, "weight": weight}
    inputs[learns].requires_grad_()
    grouped_linear(tokens, weight, torch.tensor(SIZES["uneven"])).sum().backward()
    assert {name for name, x in inputs.items() if x.grad is not None} == {learns}


def test_rows_of_no_expert_are_refused() -> None:
    tokens, weight, _ = sample([3, 2], torch.float32)
    with pytest.raises(AssertionError, match="rows of no expert"):
        grouped_linear(tokens, weight, torch.tensor([3, 1]))
