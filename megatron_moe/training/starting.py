"""Where a run starts: at its newest checkpoint, from a model, or from weights that were drawn."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.training import checkpoint
from megatron_moe.training.trainer import Trainer


def resume_or_begin(trainer: Trainer) -> Path | None:
    """Go on from the newest good checkpoint of the run, or begin it. A collective.

    Returns the checkpoint; None where the run begins. Raises InputError.
    """
    resumed_from = checkpoint.resume(trainer)
    if resumed_from is None:
        begin_from(trainer)
    return resumed_from


def begin_from(trainer: Trainer) -> None:
    """Give the model the weights that `checkpoint.initialize_from` names, if it names any; everything else
    is as for a run that draws them. Adapters keep what was drawn. A collective.

    Raises InputError.
    """
    path = trainer.experiment.checkpoint.initialize_from
    if path is None:
        return
    # Most runs need no other program's models.
    from megatron_moe.convert.loading import fill
    from megatron_moe.convert.sources import open_source

    fill(trainer.chunks, open_source(path, trainer.experiment).weights)
    # The weights that the optimizer updates, in float32 beside a model in bf16.
    trainer.optimizer.reload_model_params()
    trainer.initialized_from = path
