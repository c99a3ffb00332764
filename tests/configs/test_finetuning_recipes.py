"""Every experiment in configs/finetuning validates, fits its GPUs, and has the published values."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from megatron_moe.config.loading import load
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.auto import resolve
from megatron_moe.plan.plan import Plan, make

CONFIGS = Path(__file__).parents[2] / "configs" / "finetuning"
RANKS = {
    "mixtral_pretrain": 64,
    "mixtral_continue": 64,
    "mixtral_sft": 64,
    "mixtral_answers": 32,
    "mixtral_lora": 8,
    "st_moe": 64,
    "moe_only": 64,
    "not_moe": 64,
}
PUBLISHED = {
    "mixtral_pretrain": (256, 1e-4, 4096),
    "mixtral_continue": (256, 5e-5, 4096),
    "mixtral_sft": (128, 1e-5, 2048),
    "mixtral_answers": (32, 1e-5, 128),
}
"""Global batch, learning rate, sequence length."""


@cache
def experiment(name: str) -> Experiment:
    return resolve(load(CONFIGS / f"{name}.yaml")).experiment


@cache
def planned(name: str) -> Plan:
    return make(experiment(name))


def memory(name: str) -> float:
    """Bytes of gradients and of the optimizer's state on the fullest rank."""
    ranks = planned(name).forecast.ranks
    return max(rank.memory.gradients + rank.memory.optimizer for rank in ranks)


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_fits_what_it_is_planned_for(name: str) -> None:
    plan = planned(name)
    assert plan.layout.world_size == RANKS[name]
    rooms = [rank.memory.headroom for rank in plan.forecast.ranks]
    assert all(room is not None and room > 0 for room in rooms), rooms


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_values(name: str) -> None:
    it = experiment(name)
    assert (it.training.global_batch_size, it.optimizer.lr, it.training.seq_length) == PUBLISHED[name]


def test_st_moe_finetunes_with_smaller_batches_and_more_dropout_than_usual() -> None:
    st_moe, usual = experiment("st_moe"), experiment("mixtral_sft")
    assert st_moe.training.global_batch_size < usual.training.global_batch_size
    assert st_moe.optimizer.lr > usual.optimizer.lr
    assert st_moe.moe is not None
    assert (st_moe.model.hidden_dropout, st_moe.moe.moe_expert_dropout) == (0.1, 0.4)
    assert (st_moe.moe.moe_expert_capacity_factor, st_moe.moe.moe_z_loss_coeff) == (1.25, 1e-3)


def test_what_is_frozen_takes_no_gradients_and_no_state() -> None:
    assert memory("not_moe") < 0.2 * memory("st_moe")
    assert 0.8 * memory("st_moe") < memory("moe_only") < memory("st_moe")
