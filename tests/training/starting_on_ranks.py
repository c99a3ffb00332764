"""What the tests of runs that start from a model do on their ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from finetuning_on_ranks import draw_adapters
from train_on_ranks import begin

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import pieces
from megatron_moe.engine.pieces import Piece
from megatron_moe.training import checkpoint
from megatron_moe.training.starting import begin_from, resume_or_begin
from megatron_moe.training.trainer import Trainer


def one_step(experiment: Experiment, run: Path) -> tuple[int, float, list[Piece]]:
    """Start as `train` does and take a step. Returns the steps done before it, its loss, and the weights
    behind it."""
    trainer = begin(experiment, run)
    resume_or_begin(trainer)
    before = trainer.iteration
    loss = _loss_of_first_batch(trainer)
    found = list(pieces.of_weights(trainer.chunks))
    return before, loss, [Piece(p.name, p.shape, p.start, p.data.clone(), False) for p in found]


def save_with_adapters(experiment: Experiment, run: Path) -> float:
    """Save a model whose adapters have numbers. Returns its loss of the first batch."""
    trainer = begin(experiment, run)
    begin_from(trainer)
    draw_adapters(trainer)
    trainer.optimizer.reload_model_params()
    checkpoint.save(trainer)
    return _loss_of_first_batch(trainer)


def names_of_trained(experiment: Experiment, run: Path) -> tuple[list[str], int]:
    """What has gradients, and how many numbers the optimizer has moments of, after a step."""
    trainer = begin(experiment, run)
    _loss_of_first_batch(trainer)
    names = [piece.name for piece in pieces.of_gradients(trainer.chunks)]
    states = [part.optimizer.state for part in trainer.optimizer.chained_optimizers]
    return names, sum(one["exp_avg"].numel() for state in states for one in state.values())


@torch.no_grad()
def _loss_of_first_batch(trainer: Trainer) -> float:
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    with torch.enable_grad():
        return float(trainer.step(batches)["loss"])
