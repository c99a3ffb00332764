"""Each gate against its formula in float64 numpy, forward and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.config.schema import MoE
from megatron_moe.model.moe.gates import GATES
from megatron_moe.model.moe.gates.gate import Choice, GateInput
from megatron_moe.model.moe.gates.noisy_topk import NoisyTopK
from megatron_moe.model.moe.gates.sinkhorn import balance
from megatron_moe.model.moe.gates.swipe import assign
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.marks import mark
from megatron_moe.model.moe.microbatch import Microbatch

Array = np.ndarray[Any, np.dtype[np.float64]]
T, E, H = 24, 8, 6


class Given:
    """Random numbers that a test sets."""

    layer_number = 3

    def __init__(self, numbers: Array | None = None) -> None:
        self.numbers = numbers

    def uniform(self, purpose: str, columns: int) -> Tensor:
        assert self.numbers is not None
        return torch.from_numpy(self.numbers[:, :columns])

    normal = uniform

    def permutation(self, purpose: str, size: int) -> Tensor:
        return torch.arange(size).flip(0)


def logits_of(seed: int = 0, tokens: int = T) -> Array:
    return np.random.default_rng(seed).normal(size=(tokens, E))


def settings(**options: Any) -> MoE:
    return MoE(num_moe_experts=E, **options)


def choose(
    logits: Tensor | Array,
    bias: Array | None = None,
    numbers: Array | None = None,
    padding: Array | None = None,
    vocabulary: Array | None = None,
    training: bool = True,
    **options: Any,
) -> Choice:
    logits = torch.as_tensor(logits)
    gate = GATES[options.get("moe_router_gate", "topk")](settings(**options), H).train(training)
    marks = None
    if vocabulary is not None or padding is not None:
        numbers_of = torch.zeros(len(logits)) if vocabulary is None else torch.as_tensor(vocabulary)
        of_padding = None if padding is None else torch.as_tensor(padding)[:, None]
        marks = mark(of_padding, numbers_of[:, None], torch.arange(len(logits))[:, None])
    microbatch = Microbatch(len(logits), 1, MoEGroups(), marks)
    return gate(
        GateInput(
            torch.zeros(len(logits), H),
            logits,
            microbatch,
            None if bias is None else torch.from_numpy(bias),
            Given(numbers),  # type: ignore[arg-type]
        )
    )


def softmax(x: Array) -> Array:
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def slopes(function: Callable[[Array], float], at: Array) -> Array:
    """The gradient by central differences."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-6
        found[index] = (function(at + step) - function(at - step)) / 2e-6
    return found


def assert_weights(
    logits: Array, formula: Callable[[Array, Array], Array], experts: Array, **options: Any
) -> None:
    """The gate chooses `experts`, its weights are `formula(logits, experts)`, and their gradient is its."""
    x = torch.from_numpy(logits).requires_grad_()
    choice = choose(x, **options)
    assert choice.experts.numpy().tolist() == experts.tolist()
    np.testing.assert_allclose(choice.weights.detach().numpy(), formula(logits, experts), rtol=1e-12)
    upstream = np.random.default_rng(1).normal(size=experts.shape)
    (choice.weights * torch.from_numpy(upstream)).sum().backward()
    assert x.grad is not None
    expected = slopes(lambda z: float((formula(z, experts) * upstream).sum()), logits)
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-8)
    np.testing.assert_allclose(choice.scores.detach().sum(-1).numpy(), 1, rtol=1e-12)


def at(values: Array, experts: Array) -> Array:
    return np.take_along_axis(values, experts, axis=1)


def best(values: Array, k: int) -> Array:
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def over_sum(values: Array) -> Array:
    return values / values.sum(-1, keepdims=True)


SCORES: dict[str, tuple[dict[str, Any], Callable[[Array, Array], Array]]] = {
    "softmax after": ({"moe_router_topk": 3}, lambda z, chosen: softmax(at(z, chosen))),
    "softmax before": (
        {"moe_router_topk": 3, "moe_router_pre_softmax": True},
        lambda z, chosen: at(softmax(z), chosen),
    ),
    "sigmoid": (
        {"moe_router_topk": 3, "moe_router_score_function": "sigmoid"},
        lambda z, chosen: over_sum(at(sigmoid(z), chosen)),
    ),
    "sigmoid, one": (
        {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
        lambda z, chosen: at(sigmoid(z), chosen),
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_topk(name: str) -> None:
    options, formula = SCORES[name]
    logits = logits_of()
    assert_weights(logits, formula, best(logits, options["moe_router_topk"]), **options)


def test_an_expert_bias_moves_the_choice_and_not_the_weights() -> None:
    """DeepSeek-V3, eqs. 13 to 16."""
    logits, bias = logits_of(), np.linspace(-0.5, 0.5, E)
    options, formula = SCORES["sigmoid"]
    experts = best(sigmoid(logits) + bias, 3)
    assert experts.tolist() != best(logits, 3).tolist()
    assert_weights(logits, formula, experts, bias=bias, **options)


def of_best_groups(values: Array, k: int, groups: int, chosen: int, summed: int) -> Array:
    """Loops over tokens: the k best of the experts in the `chosen` groups with the largest sum of their
    `summed` largest values."""
    found = []
    for row in values:
        members = [list(range(g * E // groups, (g + 1) * E // groups)) for g in range(groups)]
        value = [sum(sorted((row[j] for j in group), reverse=True)[:summed]) for group in members]
        kept = sorted(range(groups), key=lambda g: -value[g])[:chosen]
        allowed = [j for g in kept for j in members[g]]
        found.append(sorted(allowed, key=lambda j: -row[j])[:k])
    return np.array(found)


@pytest.mark.parametrize(
    ("score", "summed"), [("softmax", 1), ("sigmoid", 2)], ids=["DeepSeek-V2", "DeepSeek-V3"]
)
def test_groups_limit_the_choice(score: str, summed: int) -> None:
    """V2: a group is worth its best expert (sec. 2.2.2); V3: the sum of its k / M best (sec. 2.1.2)."""
    logits = logits_of(5, 200)
    options = {"moe_router_topk": 4, "moe_router_num_groups": 2, "moe_router_group_topk": 2}
    options |= {"moe_router_num_groups": 4, "moe_router_score_function": score}
    values = sigmoid(logits) if score == "sigmoid" else logits
    experts = of_best_groups(values, 4, groups=4, chosen=2, summed=summed)
    assert choose(logits, **options).experts.numpy().tolist() == experts.tolist()
    assert experts.tolist() != of_best_groups(values, 4, groups=4, chosen=2, summed=3 - summed).tolist()


def test_switch() -> None:
    logits = logits_of()
    assert_weights(
        logits,
        lambda z, chosen: at(softmax(z), chosen),
        best(logits, 1),
        moe_router_gate="switch",
        moe_router_topk=1,
    )


def test_gshard_drops_second_experts_by_chance() -> None:
    """Algorithm 1: g1 and g2 over their sum; the second where a random number is below 2 g2."""
    logits, numbers = logits_of(), np.random.default_rng(2).uniform(size=(T, 1))
    shares = over_sum(at(softmax(logits), best(logits, 2)))
    taken = np.concatenate([np.ones((T, 1)), numbers < 2 * shares[:, 1:]], axis=1)
    assert 0 < taken[:, 1].sum() < T
    options = {"moe_router_gate": "gshard", "numbers": numbers}
    assert_weights(
        logits, lambda z, chosen: over_sum(at(softmax(z), chosen)) * taken, best(logits, 2), **options
    )
    choice = choose(logits, **options)
    assert choice.first_choices_first
    assert choice.chosen is not None and choice.chosen.numpy().tolist() == (taken > 0).tolist()
    assert choose(logits, training=False, **options).chosen is None


def noisy_by_formula(
    logits: Array, raw_deviation: Array, noise: Array, k: int, experts: Array
) -> tuple[Array, Array]:
    """Weights and load of Shazeer et al. 2017, eqs. 3 to 5, 8 and 9, token by token."""
    deviation = np.log1p(np.exp(raw_deviation))
    noisy = logits + noise * deviation
    load = np.zeros_like(logits)
    for token, row in enumerate(noisy):
        for expert in range(E):
            others = sorted(np.delete(row, expert), reverse=True)
            argument = (logits[token, expert] - others[k - 1]) / deviation[token, expert]
            load[token, expert] = (1 + math.erf(argument / math.sqrt(2))) / 2
    return softmax(at(noisy, experts)), load


@pytest.mark.parametrize("k", [1, 2, 7])
def test_noisy_topk(k: int) -> None:
    rng = np.random.default_rng(3)
    tokens = 5
    hidden, router, noise_weight = (
        rng.normal(size=(tokens, H)),
        rng.normal(size=(E, H)),
        rng.normal(size=(E, H)),
    )
    noise = rng.normal(size=(tokens, E))
    gate = NoisyTopK(settings(moe_router_gate="noisy_topk", moe_router_topk=k), H).double()
    assert not gate.noise_weight.any(), "the paper starts from zeros"
    gate.noise_weight.data = torch.from_numpy(noise_weight)
    x, w = torch.from_numpy(hidden).requires_grad_(), torch.from_numpy(router).requires_grad_()
    given = GateInput(x, x @ w.T, Microbatch(tokens, 1, MoEGroups()), None, Given(noise))  # type: ignore[arg-type]
    choice = gate(given)
    experts = choice.experts.numpy()

    deviation = np.log1p(np.exp(hidden @ noise_weight.T))
    assert experts.tolist() == best(hidden @ router.T + noise * deviation, k).tolist()
    weights, load = noisy_by_formula(hidden @ router.T, hidden @ noise_weight.T, noise, k, experts)
    np.testing.assert_allclose(choice.weights.detach().numpy(), weights, rtol=1e-12)
    np.testing.assert_allclose(choice.load.detach().numpy(), load, rtol=1e-10)

    of_weights, of_load = rng.normal(size=(tokens, k)), rng.normal(size=(tokens, E))
    (
        (choice.weights * torch.from_numpy(of_weights)).sum()
        + (choice.load * torch.from_numpy(of_load)).sum()
    ).backward()

    def value(hidden: Array, router: Array, noise_weight: Array) -> float:
        weights, load = noisy_by_formula(hidden @ router.T, hidden @ noise_weight.T, noise, k, experts)
        return float((weights * of_weights).sum() + (load * of_load).sum())

    grads = [x.grad, w.grad, gate.noise_weight.grad]
    expected = [
        slopes(lambda z: value(z, router, noise_weight), hidden),
        slopes(lambda z: value(hidden, z, noise_weight), router),
        slopes(lambda z: value(hidden, router, z), noise_weight),
    ]
    for grad, by_formula in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad.numpy(), by_formula, rtol=1e-6, atol=1e-7)
    quiet = gate.eval()(given)
    assert quiet.load is None
    assert quiet.experts.numpy().tolist() == best(hidden @ router.T, k).tolist()


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn(k: int) -> None:
    """exp(z) * d, rows and columns with equal sums; weights don't know of d."""
    logits = logits_of(4, 60) + np.linspace(0, 2, E)
    rows, columns = np.ones(60), np.ones(E)
    for _ in range(500):
        rows = 1 / 60 / (np.exp(logits) * columns).sum(1)
        columns = 1 / E / (np.exp(logits) * rows[:, None]).sum(0)
    balanced = np.exp(logits) * columns
    formula = (lambda z, c: at(softmax(z), c)) if k > 1 else (lambda z, c: at(sigmoid(z), c))
    assert_weights(logits, formula, best(balanced, k), moe_router_gate="sinkhorn", moe_router_topk=k)
    plain = choose(logits, training=False, moe_router_gate="sinkhorn", moe_router_topk=k)
    assert plain.experts.numpy().tolist() == best(logits, k).tolist()
    loads = np.bincount(best(balanced, k).flatten(), minlength=E)
    assert loads.std() < 0.5 * np.bincount(best(logits, k).flatten(), minlength=E).std()


def test_sinkhorn_of_large_logits_and_of_no_tokens() -> None:
    assert torch.isfinite(balance(torch.from_numpy(logits_of() * 1000))).all()
    assert balance(torch.zeros(0, E)).tolist() == [0.0] * E


@pytest.mark.parametrize("gate", ["sinkhorn", "swipe", "forced_balance"])
def test_padding_does_not_move_where_targets_go(gate: str) -> None:
    """These gates balance over all targets: what is padding takes nobody's place."""
    logits, padding = logits_of(6), np.arange(T) % 3 == 1
    numbers = np.random.default_rng(0).uniform(size=(T, E))
    without = choose(logits[~padding], numbers=numbers[~padding], moe_router_gate=gate)
    among = choose(logits, numbers=numbers, padding=padding, moe_router_gate=gate)
    assert among.experts[~padding].tolist() == without.experts.tolist()
    torch.testing.assert_close(among.weights[~padding], without.weights)
    assert without.experts.tolist() != best(logits[~padding], 2).tolist()
    if gate != "forced_balance":
        assert (among.weights[padding] > 0).all(), "a prompt passes its experts, too"


def seats(values: Array, k: int, workers: int) -> list[list[int | None]]:
    """SWIPE as a loop: in each round who finds no room chooses again."""
    tokens, room = len(values), [-(-len(values) * k // workers)] * workers
    goes: list[list[int | None]] = [[] for _ in range(tokens)]
    for _ in range(k):
        left = list(range(tokens))
        while left:
            wanted = {}
            for token in left:
                possible = [j for j in range(E) if j not in goes[token] and room[j // (E // workers)] > 0]
                wanted[token] = max(possible, key=lambda j: values[token, j], default=None)
            again = []
            for token, expert in wanted.items():
                if expert is None:
                    goes[token].append(None)
                elif room[expert // (E // workers)] > 0:
                    room[expert // (E // workers)] -= 1
                    goes[token].append(expert)
                else:
                    again.append(token)
            left = again
    return goes


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_swipe(workers: int, k: int) -> None:
    values = logits_of(7, 50) + np.linspace(0, 3, E)
    experts, made = assign(torch.from_numpy(values), None, k, workers)
    expected = seats(values, k, workers)
    actual = [
        [expert if is_made else None for expert, is_made in zip(*row, strict=True)]
        for row in zip(experts.tolist(), made.tolist(), strict=True)
    ]
    assert actual == expected
    assert all(len(set(row)) == k for row in experts.tolist())
    loads = np.bincount(experts[made].numpy() // (E // workers), minlength=workers)
    assert loads.max() <= -(-50 * k // workers)
    assert made.sum() >= 50 * k - workers * k, "few choices are left out"


def test_swipe_weighs_the_experts_that_it_assigns() -> None:
    logits = logits_of(7) + np.linspace(0, 3, E)
    experts, made = (part.numpy() for part in assign(torch.from_numpy(logits), None, 2, 4))
    assert made.all()
    assert_weights(
        logits,
        lambda z, chosen: softmax(at(z, chosen)),
        experts,
        moe_router_gate="swipe",
        moe_num_device_groups=4,
    )
    assert (
        choose(logits, training=False, moe_router_gate="swipe").experts.tolist() == best(logits, 2).tolist()
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "hash"])
def test_broken_logits_keep_no_gate_from_choosing(gate: str, value: float) -> None:
    """The run ends once they are counted: nothing may wait or fail before."""
    for broken in ((3, 4), (slice(None), 4), (slice(None), slice(None)), (5, slice(None))):
        logits = logits_of(7)
        logits[broken] = value
        k = {"switch": 1, "gshard": 2}.get(gate, 2)
        numbers = np.full((T, E), 0.5)
        experts = choose(logits, numbers=numbers, moe_router_gate=gate, moe_router_topk=k).experts
        assert experts.shape == (T, k) and experts.min() >= 0 and experts.max() < E


def test_hash_spreads_the_vocabulary_evenly() -> None:
    vocabulary = np.arange(5 * E)
    choice = choose(np.zeros((5 * E, E)), vocabulary=vocabulary, moe_router_gate="hash", moe_router_topk=3)
    assert np.bincount(choice.experts.flatten()).tolist() == [5 * 3] * E
    assert np.bincount(choice.experts[:, 0]).tolist() == [5] * E
    assert all(len(set(row)) == 3 for row in choice.experts.tolist())
    assert choice.weights.unique().tolist() == pytest.approx([1 / 3])
    again = choose(np.zeros((2, E)), vocabulary=np.array([39, 1]), moe_router_gate="hash", moe_router_topk=3)
    assert again.experts.tolist() == [choice.experts[39].tolist(), choice.experts[1].tolist()]
    orders = {tuple(block) for block in choice.experts[:, 0].view(5, E).tolist()}
    assert len(orders) == 5, "no two parts of the vocabulary in one order"


def test_hash_needs_numbers_of_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="call the layer with marks"):
        choose(logits_of(), moe_router_gate="hash")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_forced_balance_is_even(k: int) -> None:
    numbers = np.random.default_rng(8).uniform(size=(T, E))
    logits = logits_of()
    choice = choose(logits, numbers=numbers, moe_router_gate="forced_balance", moe_router_topk=k)
    assert np.bincount(choice.experts.flatten()).tolist() == [T * k // E] * E
    assert all(len(set(row)) == k for row in choice.experts.tolist())
    assert_weights(
        logits,
        lambda z, chosen: softmax(at(z, chosen)),
        choice.experts.numpy(),
        numbers=numbers,
        moe_router_gate="forced_balance",
        moe_router_topk=k,
    )
