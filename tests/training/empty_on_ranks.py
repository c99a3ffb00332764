"""Run on ranks: runs in which experts, ranks or microbatches get nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_on_ranks import begin

from megatron_moe.config.schema import Experiment
from megatron_moe.data.pretraining import Datasets
from megatron_moe.data.samples import Samples
from megatron_moe.model.moe.gates.gate import Choice, GateInput
from megatron_moe.training.callback import Record
from megatron_moe.training.moe_sums import routers_of
from megatron_moe.training.trainer import Trainer


def all_to_the_first_experts(trainer: Trainer) -> None:
    """Every token goes to experts 0 .. k - 1, so that with enough ranks some have no token to compute."""
    for router in (router for chunk in trainer.chunks for router in routers_of(chunk)):
        _fix(router.gate)


def _fix(gate: Any) -> None:
    choose = gate.forward

    def forward(given: GateInput) -> Choice:
        choice: Choice = choose(given)
        experts = torch.arange(choice.experts.size(1)).expand_as(choice.experts).contiguous()
        return replace(choice, experts=experts, weights=choice.scores.gather(1, experts))

    gate.forward = forward


class _Unmarked:
    """Samples of which every second one is padding from end to end."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = dict(self.samples[index])
        mask = sample["loss_mask"] * (index % 2)
        return {**sample, "loss_mask": mask, "padding_mask": mask == 0}


def only_padding(trainer: Trainer) -> None:
    """With one sequence a microbatch, some microbatches are nothing but padding."""
    trainer.datasets = Datasets(train=_Unmarked(trainer.datasets.train), valid=None)


def steps_to_the_first_experts(experiment: Experiment, run: Path) -> list[Record]:
    """The records of two steps in which all tokens go to the first experts."""
    trainer = begin(experiment, run)
    all_to_the_first_experts(trainer)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    return [trainer.step(batches) for _ in range(2)]


def steps_some_without_targets(experiment: Experiment, run: Path) -> tuple[Record, Record]:
    """The records of a step over targets, and of one over nothing but padding."""
    trainer = begin(experiment, run)
    only_padding(trainer)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=False)
    records = [trainer.step(batches) for _ in range(2)]
    return records[1], records[0]
