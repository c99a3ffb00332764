"""The router decides, loses and counts the same in every layout; padding counts nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import router_on_ranks
import torch
from distributed import ranks
from experiments import experiment, layout
from torch import Tensor

from megatron_moe.model.moe.marks import TOKEN_BITS, mark
from megatron_moe.model.moe.statistics import NUMBERS

S, B, E, K = 16, 2, 4, 2
MOE = {"num_moe_experts": E, "moe_ffn_hidden_size": 16, "moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.2}
POLICIES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "probs": {"moe_expert_capacity_factor": 0.7},
    "position": {"moe_expert_capacity_factor": 0.7, "moe_token_drop_policy": "position"},
}
SIGMOID = {"moe_router_score_function": "sigmoid"}
GATES: dict[str, dict[str, Any]] = {
    "noisy": {"moe_router_gate": "noisy_topk", "moe_input_jitter_eps": 0.2},
    "switch": {"moe_router_gate": "switch", "moe_router_topk": 1, "moe_input_jitter_eps": 0.2},
    "gshard": {"moe_router_gate": "gshard", "moe_expert_capacity_factor": 0.7},
    "sinkhorn": {"moe_router_gate": "sinkhorn"},
    "swipe": {"moe_router_gate": "swipe", "moe_num_device_groups": 2, **SIGMOID},
    "hash": {"moe_router_gate": "hash", "moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.0},
    "forced": {"moe_router_gate": "forced_balance", "moe_router_logit_normalization": 2.0},
    "groups": {"moe_router_num_groups": 2, "moe_router_group_topk": 1, **SIGMOID},
}
LAYOUTS = {"TP2": (2, layout(tp=2)), "CP2": (2, layout(cp=2)), "TP2 x CP2": (4, layout(tp=2, cp=2))}


def hidden() -> Tensor:
    return torch.randn(S, B, 32, generator=torch.Generator().manual_seed(0))


def padding() -> Tensor:
    """[b, s]: the tails of both sequences, of different lengths, so that every rank has another number of
    targets."""
    return torch.arange(S)[None, :] >= torch.tensor([[5], [11]])


def routed(moe: dict[str, Any], mask: Tensor | None, world: int = 1, **options: Any) -> dict[str, Tensor]:
    whole_mask = options.pop("whole_mask", False)
    setup = experiment(moe=MOE | moe, **options)
    return ranks(world).run(router_on_ranks.route, setup, hidden(), mask, whole_mask)[0]


@pytest.mark.second_pair
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_every_layout_decides_the_same(policy: str, padded: bool, name: str) -> None:
    world, parallel = LAYOUTS[name]
    mask = padding() if padded else None
    one = routed(POLICIES[policy], mask)
    many = routed(POLICIES[policy], mask, world, parallel=parallel)
    assert torch.equal(many["kept"], one["kept"])
    for key, value in one.items():
        torch.testing.assert_close(
            many[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_decides_the_same_in_every_layout(gate: str) -> None:
    """What it draws, too, with padding in between."""
    numbers = torch.arange(B * S).view(B, S) * 37 % 250
    marks = mark(padding(), numbers, torch.arange(B * S).view(B, S) + 1000)
    one = routed(GATES[gate], marks)
    for world, parallel in (LAYOUTS["TP2"], LAYOUTS["TP2 x CP2"]):
        many = routed(GATES[gate], marks, world, parallel=parallel)
        assert torch.equal(many["kept"], one["kept"])
        for key, value in one.items():
            torch.testing.assert_close(many[key], value, rtol=1e-5, atol=1e-6, equal_nan=True)
    if GATES[gate].get("moe_input_jitter_eps") or gate in ("gshard", "forced"):
        later = routed(GATES[gate], marks + (S << TOKEN_BITS))
        assert not torch.equal(later["probs"], one["probs"]), "another iteration draws anew"


def test_a_mask_of_all_tensor_parallel_ranks() -> None:
    """Megatron-Core cuts it only on the first pipeline stage."""
    cut = routed({}, padding(), 2, parallel=layout(tp=2))
    whole = routed({}, padding(), 2, parallel=layout(tp=2), whole_mask=True)
    for key, value in cut.items():
        assert torch.equal(whole[key], value)


def test_losses_by_formula() -> None:
    """Gradients of coeff * e * sum_j f_j P_j (Switch Transformer, eq. 4) and coeff * mean(logsumexp^2)
    (ST-MoE, eq. 5) over the targets, and of the gate weights: softmax over the k chosen logits."""
    mask = padding()
    valid = ~mask.T.flatten()
    x = hidden().double().requires_grad_()
    weight = (torch.randn(E, 32, generator=torch.Generator().manual_seed(4)) * 0.3).double().requires_grad_()
    logits = (x @ weight.T).flatten(0, 1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(K).indices, 1.0)
    gates = logits.masked_fill(chosen == 0, -torch.inf).softmax(-1)
    fractions = chosen[valid].sum(0) / (valid.sum() * K)
    balance = E * (fractions * logits[valid].softmax(-1).mean(0)).sum()
    z = logits[valid].logsumexp(-1).square().mean()
    upstream = torch.randn(S, B, E, generator=torch.Generator().manual_seed(8)).flatten(0, 1)
    ((gates * upstream).sum() + 0.3 * balance + 0.2 * z).backward()

    actual = routed({}, mask)
    torch.testing.assert_close(actual["probs"].flatten(0, 1).double(), gates.detach(), rtol=1e-5, atol=1e-6)
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(actual["input"].double(), x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["weight"].double(), weight.grad, rtol=1e-5, atol=1e-5)
    row = actual["statistics"][0]
    torch.testing.assert_close(row[:E], chosen[valid].sum(0))
    assert float(row[3 * E]) == pytest.approx(float(z.detach() * valid.sum()), rel=1e-6)
    assert int(row[3 * E + NUMBERS.index("tokens")]) == int(valid.sum())


def test_drops_show_in_the_statistics() -> None:
    row = routed(POLICIES["probs"], None)["statistics"][0]
    before, after = row[:E], row[E : 2 * E]
    capacity = -(-S * B * K * 7 // (E * 10))
    assert torch.equal(after, before.clamp(max=capacity))
    assert before.sum() == S * B * K and after.sum() < before.sum()


@pytest.mark.second_pair
def test_a_microbatch_is_counted_once_also_under_recompute() -> None:
    assert ranks(1).run(router_on_ranks.recorded, experiment(moe=MOE), hidden())[0] == [1, 2, 2, 2]
