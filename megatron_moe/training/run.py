"""`train`, as one rank: from an experiment and its plan to a trained model."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.plan.plan import Plan
from megatron_moe.training.build import start
from megatron_moe.training.callback import Callback
from megatron_moe.training.callbacks.checkpointing import Checkpointing
from megatron_moe.training.callbacks.curves import Curves
from megatron_moe.training.callbacks.evaluation import Evaluation
from megatron_moe.training.callbacks.metrics_file import MetricsFile
from megatron_moe.training.callbacks.progress import ProgressBar
from megatron_moe.training.callbacks.sink import Feed, Sink
from megatron_moe.training.callbacks.tensorboard import TensorBoard
from megatron_moe.training.callbacks.termination import Termination
from megatron_moe.training.callbacks.weights_and_biases import WeightsAndBiases, mode_of
from megatron_moe.training.starting import resume_or_begin
from megatron_moe.training.summary import say_beginning, say_summary

DONE, START_AGAIN = 0, 75
LOG = "log.txt"


def train(run_folder: Path, experiment: Experiment, plan: Plan) -> int:
    """Train what is left of a run, from its newest good checkpoint on.

    The run folder is there, and this job's alone. Collective over all ranks of `plan`.

    Returns:
        0 when all iterations are done, 75 when a signal stopped the run, which was saved.
        Raises InputError, and RunError where a checkpoint cannot be written.
    """
    trainer = start(experiment, plan, run_folder)
    resumed_from = resume_or_begin(trainer)
    trainer.callbacks = standard_callbacks(run_folder, experiment)
    if dist.get_rank() == 0:
        say_beginning(trainer, resumed_from, run_folder / LOG)
    trainer.fit()
    # No rank leaves before all have done everything: the first that does may have the others ended.
    dist.barrier()
    if dist.get_rank() == 0:
        say_summary(trainer, run_folder / LOG)
    groups.shutdown()
    finished = trainer.iteration >= experiment.training.train_iters
    return DONE if finished else START_AGAIN


def standard_callbacks(run_folder: Path, experiment: Experiment) -> list[Callback]:
    """In the order in which they see a step: what adds to its record, what writes it down, what saves, what
    passes it on."""
    callbacks: list[Callback] = [Termination(), Evaluation()]
    log = run_folder / LOG
    speaks = dist.get_rank() == 0
    if speaks:
        callbacks += [MetricsFile(run_folder / "metrics.jsonl", log), ProgressBar(log)]
    callbacks.append(Checkpointing())
    if speaks:
        # Behind the checkpoint: when time is short, what others hold can be had from metrics.jsonl.
        callbacks += [Feed(sink, log) for sink in sinks(run_folder, experiment)]
        if experiment.logging.curves:
            callbacks.append(Curves(run_folder, log))
    return callbacks


def sinks(run_folder: Path, experiment: Experiment) -> list[Sink]:
    """Where the numbers go beside metrics.jsonl."""
    chosen: list[Sink] = []
    settings = experiment.logging
    if settings.tensorboard:
        chosen.append(TensorBoard(run_folder / "tensorboard"))
    if settings.wandb is not None and (mode := mode_of(settings.wandb, os.environ)) is not None:
        chosen.append(WeightsAndBiases(run_folder, experiment, mode))
    return chosen
