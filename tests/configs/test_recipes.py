"""Every experiment in configs/: it validates, fits the GPUs that it names, and has the published size."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from megatron_moe.config.loading import load
from megatron_moe.plan.auto import resolve
from megatron_moe.plan.plan import Plan, make

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

SIZES = {
    "mixtral_8x7b": (46.7, 12.9),
    "mixtral_8x22b": (141, 39),
    "skywork_moe_146b": (146, 22.7),
    "skywork_13b": (13.85, 13.85),
    "qwen2_57b_a14b": (57.4, 14.2),
    "qwen3_235b_a22b": (235, 22.2),
    "qwen3_30b_a3b": (30.5, 3.3),
    "deepseek_v2": (236, 21.4),
    "deepseek_v3": (671, 37.5),
}
"""Billions of parameters, all and active, with embeddings, as published; of the active ones that are
published in two digits, 22, 21, 37, A14B, A22B, what the released config.json makes them to be."""

RANKS = {
    "quickstart": 2,
    "mixtral_8x7b": 64,
    "mixtral_8x22b": 128,
    "skywork_moe_146b": 1536,
    "skywork_13b": 512,
    "qwen2_57b_a14b": 64,
    "qwen3_235b_a22b": 256,
    "qwen3_30b_a3b": 16,
    "deepseek_v2": 512,
    "deepseek_v3": 2048,
}


@cache
def planned(name: str) -> Plan:
    return make(resolve(load(CONFIGS / f"{name}.yaml")).experiment)


def test_every_recipe_is_tested() -> None:
    assert set(RECIPES) == set(RANKS) == {*SIZES, "quickstart"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_what_it_is_planned_for(name: str) -> None:
    plan = planned(name)
    assert plan.layout.world_size == RANKS[name]
    rooms = [rank.memory.headroom for rank in plan.forecast.ranks]
    assert all(room is None or room > 0 for room in rooms), rooms


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_has_the_published_size(name: str) -> None:
    total, active = SIZES[name]
    parameters = planned(name).parameters
    assert parameters.total / 1e9 == pytest.approx(total, rel=0.01)
    assert parameters.active / 1e9 == pytest.approx(active, rel=0.02)
