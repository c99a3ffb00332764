"""The MoE layer alone: its formula, modules of the user's own, errors, and several ranks."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import mixtures_on_ranks as on_ranks
import numpy as np
import pytest
import torch
from distributed import ranks
from torch import Tensor, nn

import megatron_moe
from megatron_moe.config.errors import InputError, RunError
from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.layer import MixtureOfExperts

WIDTH = 16


def layer(**settings: Any) -> MixtureOfExperts:
    torch.manual_seed(1)
    return MixtureOfExperts(WIDTH, **{"num_experts": 4, "ffn_hidden_size": 24} | settings)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def by_formula(mixture: MixtureOfExperts, x: Tensor) -> np.ndarray:
    """sum over the 2 experts of the largest logits of p_e fc2_e(silu(gate_e x) * up_e x), token by token in
    float64; plus the gated shared experts."""
    state = {name: value.double().numpy() for name, value in mixture.state_dict().items()}
    tokens = x.detach().double().numpy().reshape(-1, WIDTH)
    result = np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        logits = state["router.weight"] @ token
        best = np.argsort(-logits)[:2]
        weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
        for expert, weight in zip(best, weights, strict=True):
            gate, up = np.split(state["experts.linear_fc1"][expert] @ token, 2)
            result[t] += weight * (state["experts.linear_fc2"][expert] @ (silu(gate) * up))
        if "shared.gate" in state:
            gate, up = np.split(state["shared.linear_fc1"] @ token, 2)
            open_by = 1 / (1 + np.exp(-(state["shared.gate"] @ token)))
            result[t] += open_by * (state["shared.linear_fc2"] @ (silu(gate) * up))
    return result.reshape(x.shape)


@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 5, WIDTH), (2, 3, 5, WIDTH)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_output_is_that_of_the_formula(shape: tuple[int, ...], batch_first: bool) -> None:
    shared = {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True}
    mixture = layer(batch_first=batch_first, dtype=torch.float64, init_method_std=0.5, **shared)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        np.testing.assert_allclose(mixture(x).numpy(), by_formula(mixture, x), rtol=1e-5, atol=1e-7)


def test_works_without_megatron_core_or_process_group() -> None:
    program = (
        "import sys, torch, megatron_moe\n"
        "layer = megatron_moe.MixtureOfExperts(8, num_experts=4)\n"
        "layer(torch.randn(3, 8)).sum().backward()\n"
        "megatron_moe.end_iteration(layer)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'megatron']\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_modules_as_experts_and_gate() -> None:
    """As the same network written out."""
    gate = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4))
    experts = [on_ranks.Own() for _ in range(4)]
    given = iter(experts)
    mixture = MixtureOfExperts(
        WIDTH, num_experts=4, expert=lambda: next(given), gate=lambda: gate, moe_aux_loss_coeff=0.0
    )
    x = torch.randn(2, 5, WIDTH)
    weights, best = gate(x).topk(2)
    weights = weights.softmax(-1)
    outputs = torch.stack([expert(x) for expert in experts], dim=-2)
    expected = (weights.unsqueeze(-1) * outputs.take_along_dim(best.unsqueeze(-1), dim=-2)).sum(-2)
    upstream = torch.randn_like(x)
    parameters = [*gate.parameters(), *(p for expert in experts for p in expert.parameters())]
    wanted = torch.autograd.grad(expected, parameters, upstream)
    actual = mixture(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, parameters, upstream), wanted)


class Alternating(Gate):
    """Token t to expert t modulo e."""

    takes_logits = False

    def forward(self, given: GateInput) -> Choice:
        tokens, experts = given.logits.shape
        chosen = (torch.arange(tokens) % experts)[:, None]
        scores = torch.zeros(tokens, experts).scatter(1, chosen, 1.0)
        return Choice(chosen, torch.ones(tokens, 1), scores)


def test_a_gate_of_ones_own_chooses() -> None:
    mixture = layer(gate=Alternating, moe_router_load_balancing_type="none")
    mixture(torch.randn(10, WIDTH))
    assert mixture.statistics().load == [3, 3, 2, 2]
    assert "router.weight" not in mixture.state_dict()


def test_a_bias_of_the_router_is_not_beside_logits_of_ones_own() -> None:
    """But of the router's own it is a weight like another."""
    biased = MixtureOfExperts(WIDTH, num_experts=4, moe_router_bias=True)
    with torch.no_grad():
        biased.router.bias[2] = 100.0
    biased(torch.randn(6, WIDTH))
    assert biased.statistics().load[2] == 6
    with pytest.raises(InputError, match="moe_router_bias: has no effect on logits of your own gate"):
        MixtureOfExperts(WIDTH, num_experts=4, gate=lambda: nn.Linear(WIDTH, 4), moe_router_bias=True)


class Broken(Alternating):
    """Forgets the scores of an expert."""

    def forward(self, given: GateInput) -> Choice:
        choice = super().forward(given)
        return Choice(choice.experts, choice.weights, choice.scores[:, 1:])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 4, "topk": 5}, "topk: 5 is more than num_experts (4); use at most 4"),
        ({"num_experts": 4, "topk": 1}, "1 expert a token gives the router no gradient"),
        ({"num_experts": None}, "num_experts: is missing"),
        ({"moe_router_gat": "topk"}, "moe_router_gat: unknown key; did you mean moe_router_gate?"),
        ({"router": "topk"}, "router: unknown key; the nearest are moe_router_topk, moe_router_gate,"),
        ({"moe_router_topk": 1, "topk": 2}, "topk: is the same as moe_router_topk"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: has no effect on a layer alone"),
        (
            {"expert": lambda: nn.Linear(16, 16)},
            "ffn_hidden_size: has no effect on experts that `expert`",
        ),
        ({"moe_token_dispatcher_type": "flex"}, "flex needs Megatron-Core's own layer"),
        ({"moe_aux_loss_coeff": -1.0}, "moe_aux_loss_coeff: must be"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        layer(**settings)
    assert words in str(error.value)
    assert "moe." not in str(error.value)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(InputError) as error:
        layer(topk=5, moe_router_gat="topk", moe_layer_freq=2)
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("arguments", "x", "words"),
    [
        ({"expert": lambda: nn.Linear(16, 17)}, (3, 16), "expert 0 (Linear) returned shape"),
        ({"expert": lambda: nn.LSTM(16, 3)}, (3, 16), "expert 0 (LSTM) returned shape"),
        ({"gate": lambda: nn.Linear(16, 5)}, (3, 16), "the gate (Linear) returned shape (3, 5) for 3 tokens"),
        (
            {"gate": Broken, "moe_router_load_balancing_type": "none"},
            (3, 16),
            "the gate (Broken) returned scores of shape (3, 3); it must be (3, 4)",
        ),
        ({}, (3, 15), "the layer was given input of shape (3, 15)"),
        (
            {"moe_router_gate": "hash", "moe_router_load_balancing_type": "none"},
            (3, 16),
            "token_ids: are missing",
        ),
    ],
    ids=["expert", "tuple", "gate", "own gate", "input", "hash"],
)
def test_wrong_shapes_are_named(arguments: dict[str, Any], x: tuple[int, ...], words: str) -> None:
    mixture = MixtureOfExperts(WIDTH, num_experts=4, **arguments)
    with pytest.raises(InputError) as error:
        mixture(torch.randn(x))
    assert words in str(error.value)


def test_whole_numbers_are_no_hidden_states() -> None:
    with pytest.raises(InputError, match=r"input in torch\.int64; hidden states are of floats"):
        layer()(torch.ones(3, WIDTH, dtype=torch.int64))


def test_one_module_for_all_experts_is_refused() -> None:
    module = nn.Linear(16, 16)
    with pytest.raises(InputError, match="the same module twice"):
        MixtureOfExperts(WIDTH, num_experts=4, expert=lambda: module)


def test_a_builder_that_builds_nothing_is_refused() -> None:
    module: Any = torch.nn.Linear(4, 4)
    for name in ("expert", "gate"):
        with pytest.raises(InputError, match=rf"{name}: is a module \(Linear\); .* {name}=lambda: Linear"):
            megatron_moe.MixtureOfExperts(4, num_experts=4, **{name: module})
        nothing: Any = lambda: None  # noqa: E731
        with pytest.raises(InputError, match=f"{name}: made NoneType"):
            megatron_moe.MixtureOfExperts(4, num_experts=4, **{name: nothing})


def test_no_token_at_all() -> None:
    for mixture in (layer(), MixtureOfExperts(WIDTH, num_experts=4, expert=on_ranks.Own)):
        y = mixture(torch.randn(0, WIDTH, requires_grad=True))
        y.sum().backward()
        assert y.shape == (0, WIDTH)
        assert all(p.grad is not None and p.grad.eq(0).all() for p in mixture.experts.parameters())
        megatron_moe.end_iteration(mixture)


def test_losses_come_along_or_are_collected() -> None:
    """Both ways the same gradient; attached ones with a scale of their own."""
    settings = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.25}
    attached, collected = layer(**settings), layer(attach_losses=False, **settings)
    silent = layer(moe_router_load_balancing_type="none")
    x = torch.randn(2, 5, WIDTH)
    for model in (attached, collected, silent):
        loss = model(x).square().sum()
        (loss + megatron_moe.aux_loss(model) if model is collected else loss).backward()
    router = [model.router.weight.grad for model in (attached, collected, silent)]
    torch.testing.assert_close(router[0], router[1])
    part = router[0] - router[2]
    assert float(part.norm()) > 1e-3
    halved = layer(**settings)
    megatron_moe.scale_losses(halved, 0.5)
    halved(x).square().sum().backward()
    torch.testing.assert_close(halved.router.weight.grad - router[2], part / 2)
    with pytest.raises(InputError, match="attach_losses: is true"):
        megatron_moe.aux_loss(attached)


def test_statistics_begin_anew_and_stay_small() -> None:
    mixture = layer(moe_expert_capacity_factor=0.5)
    x = torch.randn(2, 8, WIDTH)
    for _ in range(3):
        mixture(x)
    seen = mixture.statistics()
    assert seen.tokens == 48 and sum(seen.load) == 96
    # 16 tokens, 2 of 4 experts: room for 4 of 8 assignments each.
    single = [count // 3 for count in seen.load]
    assert seen.drop_rate == pytest.approx(sum(max(count - 4, 0) for count in single) / 32)
    assert seen.load_max_over_mean == max(single) / 8
    assert mixture.router.statistics.rows == [] and mixture.router.balancing.values == []
    megatron_moe.end_iteration(mixture)
    assert mixture.statistics().tokens == 0


def test_padding_counts_nowhere_and_other_layouts_of_input_are_the_same() -> None:
    mixture = layer(moe_aux_loss_coeff=1.0, attach_losses=False)
    x, padding = torch.randn(2, 8, WIDTH), torch.zeros(2, 8, dtype=torch.bool)
    padding[:, 5:] = True
    with megatron_moe.telling(mixture, padding_mask=padding):
        mixture(x)
    told = megatron_moe.aux_loss(mixture)
    assert mixture.statistics().tokens == 10
    mixture(x[:, :5])
    torch.testing.assert_close(megatron_moe.aux_loss(mixture), told)


def test_an_iteration_moves_coefficient_and_bias() -> None:
    mixture = layer(moe_expert_capacity_factor=0.5, moe_aux_loss_coeff={"xi": 0.2, "initial": 0.0})
    mixture(torch.randn(32, WIDTH))
    rate = mixture.statistics().drop_rate
    assert 0.4 < rate < 1
    megatron_moe.end_iteration(mixture)
    alpha = mixture.router.balancing.coefficients["aux_loss"].value
    assert float(alpha) == pytest.approx(0.01 * min(0.2 * rate, 0.01))
    sigmoid = {"moe_router_score_function": "sigmoid", "moe_router_load_balancing_type": "none"}
    mixture = layer(moe_router_enable_expert_bias=True, **sigmoid)
    mixture(torch.randn(32, WIDTH))
    load = torch.tensor(mixture.statistics().load)
    megatron_moe.end_iteration(mixture)
    torch.testing.assert_close(mixture.router.expert_bias, 1e-3 * (16 - load).sign().float())


def test_logits_that_are_not_finite_stop_the_iteration() -> None:
    mixture = layer(moe_aux_loss_coeff={"xi": 0.2, "initial": 0.005})
    x = torch.randn(4, WIDTH)
    x[2] = torch.nan
    mixture(x)
    with pytest.raises(RunError, match="router: got logits that are not finite, on rank 0"):
        megatron_moe.end_iteration(mixture)
    assert float(mixture.router.balancing.coefficients["aux_loss"].value) == 0.005


@pytest.mark.parametrize("own", [False, True], ids=["our experts", "modules"])
def test_autocast_and_bf16(own: bool) -> None:
    expert = {"expert": on_ranks.Own} if own else {}
    mixture = MixtureOfExperts(WIDTH, num_experts=4, **expert)
    x = torch.randn(5, WIDTH)
    exact = mixture(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mixture(x)
    torch.testing.assert_close(cast, exact, rtol=0.05, atol=0.02)
    half = MixtureOfExperts(WIDTH, num_experts=4, dtype=torch.bfloat16, **expert)
    y = half(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and half.router.weight.grad.dtype == torch.bfloat16


def test_recompute_and_copies() -> None:
    mixture = layer(moe_router_gate="noisy_topk", moe_expert_dropout=0.3)
    twin = copy.deepcopy(mixture)
    x = torch.randn(6, WIDTH)
    grads = []
    for model, again in ((mixture, False), (twin, True)):
        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if again else model(x)
        y.sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


REPLICATED = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}


@pytest.mark.second_pair
@pytest.mark.parametrize(
    ("size", "world", "wrapped", "own", "settings"),
    [
        (2, 2, False, False, REPLICATED | {"moe_router_load_balancing_type": "none"}),
        (2, 2, True, True, PADDED),
        (None, 2, True, True, {}),
        (2, 4, False, False, {"moe_token_dispatcher_type": "deduplicated"}),
        (4, 4, True, False, {"moe_token_dispatcher_type": "allgather"}),
    ],
    ids=["EP2", "EP2 of modules, DDP", "DP2, DDP", "EP2 of DP4", "EP4, DDP"],
)
def test_ranks_compute_what_one_process_computes(
    size: int | None, world: int, wrapped: bool, own: bool, settings: dict[str, Any]
) -> None:
    alone = on_ranks.build(own, settings)
    for rank in range(world):
        on_ranks.step(alone, on_ranks.data(rank))
    megatron_moe.end_iteration(alone)
    expected = on_ranks.by_expert(alone, 0)
    seen = set()
    for found in ranks(world).run(on_ranks.gradients, size, wrapped, own, settings):
        for name, value in found.items():
            wanted = expected[name] if name.startswith("buffer") else expected[name] / world
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7, msg=name)
        seen |= set(found)
    assert seen == set(expected)


def test_groups_that_do_not_fit_are_refused() -> None:
    for messages in ranks(4).run(on_ranks.refusals):
        expected = (
            "expert_parallel_size: 3 does not divide the 4 ranks; use one of 1, 2, 4",
            "num_experts: 5 is not divisible by the ranks of process_group (2)",
            "process_group: is int; give a group of ranks, as megatron_moe.expert_groups makes them",
            "expert_data_group: has 1 rank beside the 2 of process_group, of 4 ranks in all",
        )
        assert all(words in said for words, said in zip(expected, messages, strict=True))
