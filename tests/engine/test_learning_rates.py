"""Every schedule against its formula in float64, and weights with their own rates against torch's AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import rates_on_ranks as on_ranks
import torch
from distributed import ranks
from experiments import MOE, experiment

pytestmark = pytest.mark.second_pair

PEAK, LEAST, DECAY = 4e-3, 5e-4, 12
OWN = {"decoupled_lr": 1e-2, "decoupled_min_lr": 1e-3, "expert_lr": 2e-3, "expert_min_lr": 1e-4}
WSD_SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "exponential": lambda x: 2 * np.float64(0.5) ** x - 1,
    "minus_sqrt": lambda x: 1 - np.sqrt(x),
}
"""Part of the way done -> what is left of the rate above its minimum: 1 at 0, 0 at 1."""
SHAPES = {"cosine": WSD_SHAPES["cosine"], "linear": WSD_SHAPES["linear"], "constant": lambda x: 1.0}


def formula(step: int, peak: float, least: float, schedule: dict[str, Any]) -> np.float64:
    """The rate of step 1, 2, ..."""
    style, warmup, decay = schedule["lr_decay_style"], schedule["lr_warmup_iters"], schedule["lr_decay_iters"]
    if step <= warmup:
        return np.float64(peak) * step / warmup
    if style == "inverse-square-root":
        return np.float64(least) if step > decay else max(least, peak * np.sqrt(np.float64(warmup) / step))
    if style == "WSD":
        length = schedule["lr_wsd_decay_iters"]
        done = np.clip(np.float64(step - (decay - length)) / length, 0, 1)
        return least + (peak - least) * WSD_SHAPES[schedule["lr_wsd_decay_style"]](done)
    return least + (peak - least) * SHAPES[style](min(np.float64(step - warmup) / (decay - warmup), 1.0))


def schedules() -> list[dict[str, Any]]:
    styles: list[dict[str, Any]] = [{"lr_decay_style": style} for style in SHAPES]
    styles += [
        {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 4}
        for style in WSD_SHAPES
    ]
    made = [
        {**style, "lr_warmup_iters": warmup, "lr_decay_iters": DECAY} for style in styles for warmup in (0, 3)
    ]
    root = {"lr_decay_style": "inverse-square-root", "lr_decay_iters": DECAY}
    return [*made, {**root, "lr_warmup_iters": 1}, {**root, "lr_warmup_iters": 3}]


def test_every_rate_is_its_formulas() -> None:
    """From the first step to three behind the decay; and from the middle on, as after a resume."""
    made = [
        experiment(
            moe=MOE, model={"num_layers": 1}, optimizer={"lr": PEAK, "min_lr": LEAST, **OWN, **schedule}
        )
        for schedule in schedules()
    ]
    steps = DECAY + 3
    whole = ranks(1).run(on_ranks.rates, made, 0, steps)[0]
    for schedule, found in zip(schedules(), whole, strict=True):
        for key, (peak, least) in {
            "lr": (PEAK, LEAST),
            "lr/embedding": (OWN["decoupled_lr"], OWN["decoupled_min_lr"]),
            "lr/experts": (OWN["expert_lr"], OWN["expert_min_lr"]),
        }.items():
            expected = [formula(step, peak, least, schedule) for step in range(1, steps + 1)]
            assert [rates[key] for rates in found] == pytest.approx(expected, rel=1e-12), (schedule, key)
            assert found[0][key] > 0
            if schedule["lr_decay_style"] not in ("constant", "inverse-square-root"):
                assert found[DECAY - 1][key] == least
    later = ranks(1).run(on_ranks.rates, made[-4:], 7, steps - 7)[0]
    assert later == [found[7:] for found in whole[-4:]]


def test_a_warmup_over_the_whole_decay() -> None:
    optimizer = {"lr": PEAK, "min_lr": LEAST, "lr_warmup_iters": 3, "lr_decay_iters": 3}
    (found,) = ranks(1).run(on_ranks.rates, [experiment(model={"num_layers": 1}, optimizer=optimizer)], 0, 5)[
        0
    ]
    expected = [PEAK / 3, PEAK * 2 / 3, PEAK, LEAST, LEAST]
    assert [rates["lr"] for rates in found] == pytest.approx(expected, rel=1e-12)
    assert found[0].keys() == {"lr"}


def by_torch(
    before: dict[str, torch.Tensor], steps: int, tied: bool, optimizer: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The same weights, gradients and groups with torch.optim.AdamW, its rates set by the formula."""
    weights = {name: torch.nn.Parameter(weight.clone()) for name, weight in before.items()}
    at_the_ends = {"embedding.word_embeddings.weight"} | (set() if tied else {"output_layer.weight"})
    groups = []
    for name, weight in weights.items():
        is_expert = ".mlp.experts." in name
        own = "decoupled" if name in at_the_ends else "expert" if is_expert else None
        peak = optimizer.get(f"{own}_lr", PEAK)
        least = optimizer.get(f"{own}_min_lr", LEAST)
        decay = 0.0 if weight.dim() == 1 else 0.1
        groups.append({"params": [weight], "weight_decay": decay, "rates": (peak, least)})
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(steps):
        for name, weight in weights.items():
            weight.grad = on_ranks.gradient(name, step, weight)
        for group in adam.param_groups:
            group["lr"] = float(formula(step + 1, *group["rates"], optimizer))
        adam.step()
    return {name: weight.detach() for name, weight in weights.items()}


SCHEDULE = {"lr_decay_style": "linear", "lr_warmup_iters": 2, "lr_decay_iters": 5}


@pytest.mark.parametrize(
    ("own", "tied"),
    [(OWN, False), (OWN, True), ({"expert_lr": 2e-3}, False), ({"decoupled_min_lr": 1e-3}, True)],
)
def test_updates_are_adamws(own: dict[str, float], tied: bool) -> None:
    optimizer = {"lr": PEAK, "min_lr": LEAST, "clip_grad": 0.0, **SCHEDULE, **own}
    made = experiment(
        moe={**MOE, "moe_shared_expert_intermediate_size": 16},
        model={
            "num_layers": 2,
            "untie_embeddings_and_output_weights": not tied,
            "position_embedding_type": "learned_absolute",
        },
        optimizer=optimizer,
    )
    before, after = ranks(1).run(on_ranks.updated, made, 4)[0]
    expected = by_torch(before, 4, tied, optimizer)
    assert any("shared_experts" in name for name in after) and any("position" in name for name in after)
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(weight, before[name]), name


def test_rates_of_their_own_leave_other_weights_alone() -> None:
    """To the bit; and a key that repeats the main rates changes nothing at all, clipping included."""

    def weights(**own: float) -> dict[str, torch.Tensor]:
        clip = own.pop("clip_grad", 0.0)
        optimizer = {"lr": PEAK, "min_lr": LEAST, "clip_grad": clip, **SCHEDULE, **own}
        return ranks(1).run(on_ranks.updated, experiment(model={"num_layers": 2}, optimizer=optimizer), 3)[0][
            1
        ]

    plain, faster = weights(), weights(expert_lr=2e-2)
    moved = {name for name in plain if not torch.equal(plain[name], faster[name])}
    assert moved == {name for name in plain if ".mlp.experts." in name}

    clipped = weights(clip_grad=0.5)
    repeated = weights(clip_grad=0.5, expert_lr=PEAK, decoupled_lr=PEAK, decoupled_min_lr=LEAST)
    assert all(torch.equal(clipped[name], repeated[name]) for name in clipped)
    assert not all(torch.equal(clipped[name], plain[name]) for name in clipped)
