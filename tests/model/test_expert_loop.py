"""The loop over experts on a host against their formula in float64, and its way into Megatron-Core's gradient
buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.model.activations import ACTIVATIONS
from megatron_moe.model.moe import expert_loop as loops
from megatron_moe.model.moe import weight_gradient
from megatron_moe.model.moe.expert_loop import expert_loop
from megatron_moe.model.moe.host_workers import in_threads

HIDDEN, WIDTH = 6, 5
SIZES = {
    "uneven": [3, 0, 7, 2],
    "an expert longer than a block, and many short ones": [1, 2, 0, 9, 1, 1, 3, 0, 0],
    "no rows": [0, 0],
}


def sample(activation: str, sizes: list[int], dtype: torch.dtype, tokens: int = 4) -> list[Tensor]:
    """Tokens [t, h], gate weights [n], fc1, fc2."""
    generator = torch.Generator().manual_seed(3)
    gates = 2 if ACTIVATIONS[activation].is_gated else 1
    shapes = [
        (tokens, HIDDEN),
        (sum(sizes),),
        (len(sizes), gates * WIDTH, HIDDEN),
        (len(sizes), HIDDEN, WIDTH),
    ]
    # So large that a clamped activation clamps some.
    scale = 3 if activation == "clamped_swiglu" else 1
    return [(scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def activated(activation: str, inner: Tensor) -> Tensor:
    if activation == "clamped_swiglu":
        gate, up = inner[:, :WIDTH].clamp(max=7), inner[:, WIDTH:].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    function, gated, *_ = ACTIVATIONS[activation]
    return function(inner[:, :WIDTH]) * inner[:, WIDTH:] if gated else function(inner)


def by_formula(leaves: list[Tensor], activation: str, sizes: list[int], sources: Tensor | None) -> Tensor:
    tokens, weights, fc1, fc2 = leaves
    rows, parts, start = tokens if sources is None else tokens[sources], [], 0
    for expert, size in enumerate(sizes):
        inner = rows[start : start + size] @ fc1[expert].T
        inner = activated(activation, inner)
        parts.append(weights[start : start + size, None] * (inner @ fc2[expert].T))
        start += size
    result = torch.cat(parts)
    return result if sources is None else torch.zeros_like(tokens).index_add(0, sources, result)


@pytest.mark.parametrize("unsorted", [False, True], ids=["sorted rows", "from tokens"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(
    activation: str, sizes: list[int], unsorted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "BLOCK_ROWS", 4)
    leaves = sample(activation, sizes, torch.float64, tokens=4 if unsorted else sum(sizes))
    generator = torch.Generator().manual_seed(5)
    sources = torch.randint(0, 4, (sum(sizes),), generator=generator) if unsorted else None
    upstream = torch.randn(leaves[0].shape, generator=generator, dtype=torch.float64)
    found = expert_loop(*leaves, activation, sizes, sources)
    expected = by_formula(leaves, activation, sizes, sources)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    pairs = (torch.autograd.grad(x, leaves, upstream) for x in (found, expected))
    for mine, exact in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


def test_without_gradients_it_keeps_nothing_and_gives_the_same() -> None:
    leaves, sizes = sample("swiglu", SIZES["uneven"], torch.float32, tokens=12), SIZES["uneven"]
    with torch.no_grad():
        without = expert_loop(*leaves, "swiglu", sizes)
    assert without.grad_fn is None
    assert torch.equal(without, expert_loop(*leaves, "swiglu", sizes))


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("unsorted", [False, True], ids=["sorted rows", "from tokens"])
def test_threads_with_blocks_of_their_own_give_the_same_bits(
    unsorted: bool, threads_as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "BLOCK_ROWS", 4)
    sizes = [3, 1, 0, 2, 2, 4, 1, 3] * 8
    leaves = sample("swiglu", sizes, torch.float32, tokens=20 if unsorted else sum(sizes))
    sources = torch.arange(sum(sizes)) * 7 % 20 if unsorted else None

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            without = expert_loop(*leaves, "swiglu", sizes, sources)
        output = expert_loop(*leaves, "swiglu", sizes, sources)
        return [without.clone(), output, *torch.autograd.grad(output.square().sum(), leaves)]

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(loops, "in_threads", lambda work, blocks: pytest.fail("threads were used"))
        results(1)
        with pytest.raises(pytest.fail.Exception):
            results(3)
    for _ in range(5):
        for mine, alone in zip(results(3), results(1), strict=True):
            assert torch.equal(mine, alone)
        assert torch.get_num_threads() == 1


def test_an_error_of_one_thread_is_raised() -> None:
    def work(pieces: Iterator[int]) -> None:
        for piece in pieces:
            if piece == 3:
                raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        in_threads(work, range(8))
    done: list[int] = []
    in_threads(done.extend, range(8))
    assert sorted(done) == list(range(8))


def test_gate_weights_may_be_more_precise_than_tokens() -> None:
    sizes = SIZES["uneven"]
    tokens, weights, fc1, fc2 = sample("swiglu", sizes, torch.float64, tokens=12)
    lower = [x.detach().bfloat16().requires_grad_() for x in (tokens, fc1, fc2)]
    precise = weights.detach().float().requires_grad_()
    found = expert_loop(lower[0], precise, lower[1], lower[2], "swiglu", sizes)
    leaves = [x.detach().double().requires_grad_() for x in (lower[0], precise, *lower[1:])]
    expected = by_formula(leaves, "swiglu", sizes, None)
    found.sum().backward()
    expected.sum().backward()
    assert found.dtype == torch.bfloat16 and precise.grad is not None and precise.grad.dtype == torch.float32
    for mine, exact in ((found, expected), (precise.grad, leaves[1].grad), (lower[1].grad, leaves[2].grad)):
        assert mine is not None and exact is not None
        mine, exact = mine.detach(), exact.detach()
        assert float((mine.double() - exact).norm()) < 0.02 * float(exact.norm())


@pytest.mark.parametrize("learns", range(4), ids=["tokens", "gate weights", "fc1", "fc2"])
def test_only_what_learns_gets_a_gradient(learns: int) -> None:
    leaves = [x.detach() for x in sample("swiglu", SIZES["uneven"], torch.float32, tokens=12)]
    leaves[learns].requires_grad_()
    expert_loop(*leaves, "swiglu", SIZES["uneven"]).sum().backward()
    assert [x.grad is not None for x in leaves] == [index == learns for index in range(4)]


def backward_under_hooks(main_dtype: torch.dtype | None) -> tuple[list[Any], list[Tensor]]:
    """What Megatron-Core's hook sees of the two weights after a backward pass, and its buffers, which
    begin as ones."""
    tokens, probs, fc1, fc2 = sample("swiglu", SIZES["uneven"], torch.float32, tokens=12)
    weights = [torch.nn.Parameter(fc1.detach()), torch.nn.Parameter(fc2.detach())]
    for weight in weights:
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        weight.main_grad = torch.ones_like(weight, dtype=main_dtype)  # type: ignore[attr-defined]
    expert_loop(tokens, probs, *weights, "swiglu", SIZES["uneven"]).square().sum().backward()
    for weight in weights:
        if not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
            weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined,arg-type]
    return [w.grad_added_to_main_grad for w in weights], [w.main_grad for w in weights]  # type: ignore[attr-defined]


def test_gradients_are_added_to_the_buffer_once() -> None:
    tokens, probs, fc1, fc2 = sample("swiglu", SIZES["uneven"], torch.float32, tokens=12)
    by_formula([tokens, probs, fc1, fc2], "swiglu", SIZES["uneven"], None).square().sum().backward()
    for dtype, straight in ((torch.float32, True), (torch.float64, False)):
        marks, buffers = backward_under_hooks(dtype)
        assert marks == [straight, straight]
        for buffer, weight in zip(buffers, (fc1, fc2), strict=True):
            assert weight.grad is not None
            torch.testing.assert_close(buffer.float() - 1, weight.grad, rtol=1e-5, atol=1e-5)


def test_rows_of_no_expert_are_refused() -> None:
    leaves = sample("swiglu", [3, 2], torch.float32, tokens=5)
    with pytest.raises(AssertionError, match="rows of no expert"):
        expert_loop(*leaves, "swiglu", [3, 1])


def test_it_agrees_with_grouped_products() -> None:
    """What other devices, biases and dropout go through."""
    from megatron_moe.model.moe.experts import Experts, ExpertSettings
    from megatron_moe.model.moe.permutation import sort_by_expert

    experts = Experts(3, ExpertSettings(HIDDEN, WIDTH, dtype=torch.float64))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(9, HIDDEN, generator=generator, dtype=torch.float64)
    choices = torch.rand(9, 3, generator=generator).topk(2).indices
    permutation = sort_by_expert(choices, None, 3)
    probs = torch.rand(18, generator=generator, dtype=torch.float64)
    looped = experts.of_unsorted(tokens, permutation, probs)
    experts._loops = lambda tokens: False  # type: ignore[method-assign]
    torch.testing.assert_close(looped, experts.of_unsorted(tokens, permutation, probs))


def test_large_gradients_use_their_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """But never memory that somebody still looks at."""
    monkeypatch.setattr(weight_gradient, "REUSED_BYTES", 0)
    sizes = SIZES["uneven"]
    tokens, probs, *weights = (x.detach() for x in sample("swiglu", sizes, torch.float32, tokens=12))
    fc1, fc2 = (torch.nn.Parameter(x) for x in weights)

    def gradient(scale: float) -> Tensor:
        fc1.grad = None
        (scale * expert_loop(tokens, probs, fc1, fc2, "swiglu", sizes)).sum().backward()
        assert fc1.grad is not None
        return fc1.grad

    place, expected = gradient(1.0).data_ptr(), gradient(1.0).clone()
    assert gradient(1.0).data_ptr() == place
    for held in (gradient(1.0), gradient(1.0)[1:].view(-1), gradient(1.0).numpy()):
        before = held.copy() if not isinstance(held, Tensor) else held.clone()
        assert torch.equal(gradient(2.0), 2 * expected)
        assert (before == held).all()
    # Accumulated over two passes, and asked for twice without a place in the parameter.
    gradient(1.0)
    expert_loop(tokens, probs, fc1, fc2, "swiglu", sizes).sum().backward()
    torch.testing.assert_close(fc1.grad, 2 * expected)
    first, second = (
        torch.autograd.grad((scale * expert_loop(tokens, probs, fc1, fc2, "swiglu", sizes)).sum(), fc1)[0]
        for scale in (1.0, 2.0)
    )
    assert torch.equal(first, expected) and torch.equal(second, 2 * expected)
