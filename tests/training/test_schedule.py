"""Learning rate, weight decay and clipping, against their formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import train_on_ranks as on_ranks
from distributed import ranks
from experiments import experiment

PEAK, END = 4e-3, 5e-4


def formula(style: str, step: int, warmup: int, decay: int) -> float:
    """The rate of step 1, 2, ...: up to PEAK over the warm-up, then down to END at the end of the decay."""
    if step <= warmup:
        return PEAK * step / warmup
    if style == "constant":
        return PEAK
    done = min(1.0, (step - warmup) / (decay - warmup))
    if style == "linear":
        return PEAK - (PEAK - END) * done
    return END + (PEAK - END) * 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("warmup", "steps", "decay"),
    [({"lr_warmup_iters": 3}, 3, 8), ({"lr_warmup_fraction": 0.25}, 2, 8), ({}, 0, 6)],
    ids=["3 steps", "a quarter", "none, and steps behind the decay"],
)
def test_the_learning_rate_follows_its_formula(style, warmup, steps, decay):
    optimizer = {"lr": PEAK, "min_lr": END, "lr_decay_style": style, "lr_decay_iters": decay, **warmup}
    made = experiment(
        None,
        model={"num_layers": 1},
        optimizer=optimizer,
        training={"train_iters": 8, "global_batch_size": 2},
    )
    recorded = ranks(1).run(on_ranks.rates, made, Path())[0]
    expected = [formula(style, step, steps, decay) for step in range(1, 9)]
    assert [rate for rate, _ in recorded] == pytest.approx(expected, rel=1e-9)
    assert [used for _, used in recorded] == [rate for rate, _ in recorded]
    if style != "constant":
        assert recorded[-1][0] == pytest.approx(END)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_weight_decay_is_for_matrices_only(normalization):
    made = experiment(
        model={"num_layers": 2, "normalization": normalization},
        moe={"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.0},
        optimizer={"lr": 0.1, "weight_decay": 0.5, "lr_decay_style": "constant"},
    )
    shrunk = ranks(1).run(on_ranks.decays, made, Path())[0]
    norms = {name for name in shrunk if "norm" in name or name.endswith("bias")}
    assert len(norms) == (5 if normalization == "RMSNorm" else 10)
    assert any("router" in name for name in shrunk) and any("experts" in name for name in shrunk)
    for name, part in shrunk.items():
        assert part == pytest.approx(0 if name in norms else 0.05, abs=1e-5), name


@pytest.mark.parametrize("limit", [0.25, 1e4, 0.0], ids=["below the norm", "above it", "off"])
def test_gradients_are_clipped_to_the_global_norm(limit):
    made = experiment(optimizer={"lr": 1e-2, "clip_grad": limit})
    norm, given = ranks(1).run(on_ranks.clipped, made, Path())[0]
    assert norm > 0.5
    assert given == pytest.approx(limit if 0 < limit < norm else norm, rel=1e-4)
