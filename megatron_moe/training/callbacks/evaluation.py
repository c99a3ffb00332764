"""Loss on the held-out part of the data."""

from __future__ import annotations

from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.trainer import Trainer


class Evaluation(Callback):
    """Adds `eval/loss`, the mean loss a target token over `training.eval_iters` global batches, and that of
    each source of a blend, every `training.eval_interval` steps and at the end."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        training, held_out = trainer.experiment.training, trainer.datasets.valid
        if training.eval_interval is None or held_out is None:
            return
        if trainer.iteration % training.eval_interval == 0 or trainer.iteration == training.train_iters:
            record |= trainer.evaluate(held_out, training.eval_iters)
