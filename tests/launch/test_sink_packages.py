"""Packages that sinks need are missed before a rank starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.launch import sinks

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
BOTH = ["logging.tensorboard=true", "logging.wandb.project=moe"]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_missing_packages_are_named_together(nothing_installed, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(InputError) as caught:
        sinks.check(load(QUICKSTART, BOTH))
    tensorboard, wandb = caught.value.problems
    assert "logging.tensorboard" in tensorboard and "pip install 'megatron-moe[tensorboard]'" in tensorboard
    assert "logging.wandb.project" in wandb and "pip install 'wandb'" in wandb


def test_what_is_off_needs_nothing(nothing_installed, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sinks.check(load(QUICKSTART, BOTH[1:]))
    sinks.check(load(QUICKSTART, []))
