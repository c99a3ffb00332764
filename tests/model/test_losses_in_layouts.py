"""The balancing losses in every layout, under any cut into microbatches, and beside Megatron-Core's."""

from __future__ import annotations

from typing import Any

import losses_on_ranks
import pytest
import router_on_ranks
import torch
from distributed import ranks
from experiments import experiment, layout
from torch import Tensor

from megatron_moe.model.moe.losses import LOSSES
from megatron_moe.model.moe.marks import mark

S, B, E = 16, 4, 4
ALL = [name for name in LOSSES if name != "load_loss"]
MOE = {
    "num_moe_experts": E,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": ALL,
    "moe_aux_loss_coeff": [0.3, {"initial": 0.5}, {"start": 0.4, "end": 0, "iterations": 9}, *[2.0] * 5],
    "moe_z_loss_coeff": {"xi": 0.2, "initial": 0.1},
    "moe_num_device_groups": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "noisy": {
        "moe_router_gate": "noisy_topk",
        "moe_router_load_balancing_type": ["importance_loss", "load_loss"],
        "moe_aux_loss_coeff": 0.7,
        "moe_num_device_groups": None,
    },
}


def hidden() -> Tensor:
    return torch.randn(S, B, 32, generator=torch.Generator().manual_seed(0))


def padding() -> Tensor:
    """[b, s]: tails of different lengths, one sequence that is nothing else."""
    return torch.arange(S)[None, :] >= torch.tensor([[5], [11], [16], [0]])


@pytest.mark.second_pair
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_layout_has_the_same_losses_and_gradients(padded: bool, kind: str) -> None:
    moe, parallel = MOE | KINDS[kind], layout(tp=2, cp=2)
    # What random gates draw by.
    marks = mark(padding() if padded else None, torch.zeros(B, S), torch.arange(B * S).view(B, S))
    one = ranks(1).run(router_on_ranks.route, experiment(moe), hidden(), marks, False)[0]
    many = ranks(4).run(router_on_ranks.route, experiment(moe, parallel=parallel), hidden(), marks, False)[0]
    assert len(one["losses"]) == len(moe["moe_router_load_balancing_type"])
    for key in ("losses", "weight", "input"):
        torch.testing.assert_close(
            many[key], one[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_recompute_evaluation_and_passes_without_gradients_record_nothing_twice() -> None:
    assert ranks(1).run(losses_on_ranks.recorded, experiment(MOE), hidden())[0] == [1, 2, 2, 2]


CUTS = [1, 4]
"""Microbatches of the same four sequences."""


def of_ours(name: str, cut: int, mask: Tensor | None) -> Tensor:
    moe = MOE | {"moe_router_load_balancing_type": name, "moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 0.0}
    if "device" not in name:
        moe["moe_num_device_groups"] = None
    return ranks(1).run(losses_on_ranks.of_ours, experiment(moe), hidden(), mask, cut)[0]


def of_megatron(name: str, cut: int, mask: Tensor | None = None) -> Tensor:
    moe = MOE | {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
    moe["moe_num_device_groups"] = None
    return ranks(1).run(losses_on_ranks.of_megatron, experiment(moe), name, hidden(), mask, cut)[0]


def apart(a: Tensor, b: Tensor) -> float:
    """Relative difference of two gradients."""
    return float((a - b).norm() / b.norm())


@pytest.mark.second_pair
@pytest.mark.parametrize("name", ["aux_loss", "seq_aux_loss"])
def test_without_padding_they_are_megatron_cores(name: str) -> None:
    for cut in CUTS:
        assert apart(of_ours(name, cut, None), of_megatron(name, cut)) < 1e-5


@pytest.mark.parametrize("name", ["seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_cut_into_microbatches_does_not_matter(name: str, padded: bool) -> None:
    mask = padding() if padded else None
    whole = of_ours(name, 1, mask)
    assert float(whole.norm()) > 1e-3
    for cut in CUTS[1:]:
        assert apart(of_ours(name, cut, mask), whole) < 1e-5


@pytest.mark.second_pair
def test_megatron_cores_loss_over_the_global_batch_moves_with_the_cut() -> None:
    """It takes the mean of the microbatches seen so far for the global batch."""
    whole = of_megatron("global_aux_loss", 1)
    assert all(apart(of_megatron("global_aux_loss", cut), whole) > 0.01 for cut in CUTS[1:])


@pytest.mark.second_pair
def test_megatron_cores_sequences_share_one_number_of_tokens() -> None:
    """With padding, where ours divides each sequence's sums by its own tokens (DeepSeek-V3, eq. 18)."""
    assert apart(of_megatron("seq_aux_loss", 1, padding()), of_ours("seq_aux_loss", 1, padding())) > 0.01
