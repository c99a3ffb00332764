"""The experts against their formula in float64, and their checkpoints against Megatron-Core's
SequentialMLP."""

from __future__ import annotations

from pathlib import Path

import experts_on_ranks
import pytest
import torch
from distributed import ranks
from experiments import MOE, experiment, layout
from torch import Tensor

from megatron_moe.model.moe.experts import Experts, ExpertSettings

SIZES = {"uneven": [3, 0, 5, 2], "all on one": [0, 10, 0, 0], "no tokens": [0, 0, 0, 0]}
ACTIVATIONS = {
    "swiglu": lambda gate, up: gate * gate.sigmoid() * up,
    "geglu": lambda gate, up: gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up,
    "clamped_swiglu": lambda gate, up: (
        (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7))
    ),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
}
SPLIT = {
    "EP2": layout(dp=2, expert_model_parallel_size=2),
    "ETP2": layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2),
    "EDP": layout(tp=2),
}


def by_formula(
    activation: str,
    tokens: Tensor,
    probs: Tensor,
    sizes: list[int],
    fc1: Tensor,
    fc2: Tensor,
    bias1: Tensor,
    bias2: Tensor,
) -> Tensor:
    """p * (fc2_e act(fc1_e x + bias1_e) + bias2_e), expert by expert."""
    parts = []
    for e, (x, p) in enumerate(zip(tokens.split(sizes), probs.split(sizes), strict=True)):
        inner = x @ fc1[e].T + bias1[e]
        gates = 2 if activation.endswith("glu") else 1
        parts.append(p[:, None] * (ACTIVATIONS[activation](*inner.chunk(gates, -1)) @ fc2[e].T + bias2[e]))
    return torch.cat(parts)


def sample(activation: str, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Tokens, gate weights, both weights, both biases, upstream gradient."""
    generator = torch.Generator().manual_seed(6)
    count, width = len(sizes), 6 * (2 if activation.endswith("glu") else 1)
    shapes = [(sum(sizes), 8), (sum(sizes),), (count, width, 8), (count, 8, 6)]
    shapes += [(count, width), (count, 8), (sum(sizes), 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("activation", "sizes"),
    [
        *((name, SIZES["uneven"]) for name in ACTIVATIONS),
        *(("swiglu", SIZES[name]) for name in list(SIZES)[1:]),
    ],
    ids=[*ACTIVATIONS, *list(SIZES)[1:]],
)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
def test_values_and_gradients(activation: str, sizes: list[int], biased: bool, dtype: torch.dtype) -> None:
    tokens, probs, fc1, fc2, *biases, upstream = sample(activation, sizes, dtype)
    if not biased:
        biases = [torch.zeros_like(bias) for bias in biases]
    actual = ranks(1).run(
        experts_on_ranks.compute,
        activation,
        tokens,
        probs,
        sizes,
        fc1,
        fc2,
        biases if biased else [],
        upstream,
    )[0]
    leaves = [x.double().requires_grad_() for x in (tokens, probs, fc1, fc2, *biases)]
    output = by_formula(activation, leaves[0], leaves[1], sizes, *leaves[2:])
    expected = [output.detach(), *torch.autograd.grad(output, leaves, upstream.double())][: len(actual)]
    # In bf16 the clamped one rounds its products one by one.
    rounded = 2.5e-2 if activation == "clamped_swiglu" else 1e-2
    tolerance = 1e-14 if dtype == torch.float64 else rounded
    for mine, exact in zip(actual, expected, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert float((mine.double() - exact).norm()) <= tolerance * float(exact.norm())


def test_dropout_behind_the_activation() -> None:
    """What is left is larger by as much as is dropped; in evaluation nothing is."""
    experts = Experts(2, ExpertSettings(3, 400, "relu", dropout=0.25))
    for weight in (experts.linear_fc1, experts.linear_fc2):
        torch.nn.init.constant_(weight, 1.0)
    # Each activation is 3, each output the sum of those that are left.
    tokens, sizes, probs = torch.ones(50, 3), torch.tensor([20, 30]), torch.full((50,), 0.5)
    torch.manual_seed(0)
    left = experts(tokens, sizes, probs)[0].detach() / (0.5 * 3 / 0.75)
    torch.testing.assert_close(left, left.round(), rtol=0, atol=1e-3)
    assert 0.7 < float(left.mean()) / 400 < 0.8 and float(left.std()) > 1
    torch.testing.assert_close(experts.eval()(tokens, sizes, probs)[0], torch.full((50, 3), 600.0))


@pytest.mark.second_pair
def test_ranks_of_a_tensor_parallel_group_drop_differently() -> None:
    setup = experiment(
        parallel=SPLIT["EDP"],
        model={"num_layers": 1},
        moe={**MOE, "moe_expert_dropout": 0.5},
    )
    (first, first_kept), (second, second_kept) = ranks(2).run(experts_on_ranks.dropped, setup)
    assert first_kept and second_kept
    assert 0.4 < float((first == second).float().mean()) < 0.6


@pytest.mark.second_pair
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_checkpoints_hold_what_megatron_cores_experts_hold(name: str, activation: str) -> None:
    # Under ETP each rank holds a part of the second biases here, and all of them in SequentialMLP.
    biases = {"mlp_bias": name != "ETP2"}
    setup = experiment(parallel=SPLIT[name], model={"activation": activation, "num_layers": 2, **biases})
    ours = ranks(2).run(experts_on_ranks.shards, setup, False)
    theirs = ranks(2).run(experts_on_ranks.shards, setup, True)
    assert ours == theirs
    assert all(len(of_rank) > 0 for of_rank in ours)


@pytest.mark.second_pair
@pytest.mark.parametrize("name", ["EP2", "ETP2"])
@pytest.mark.parametrize("from_sequential", [True, False], ids=["theirs to ours", "ours to theirs"])
def test_checkpoints_are_interchangeable(name: str, from_sequential: bool, tmp_path: Path) -> None:
    # SequentialMLP adds the second biases once for each ETP rank, which Megatron-Core refuses.
    biases = {"mlp_bias": name != "ETP2"}
    setup = experiment(parallel=SPLIT[name], model={"num_layers": 2, **biases})
    tokens = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(1))
    for saved, loaded in ranks(2).run(
        experts_on_ranks.exchanged, setup, str(tmp_path), from_sequential, tokens
    ):
        torch.testing.assert_close(loaded, saved, rtol=1e-5, atol=1e-6)
