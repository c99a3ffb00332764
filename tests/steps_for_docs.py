"""Runs on a rank for `test_docs`: which keys does a run write?"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from experiments import experiment

from megatron_moe.plan import plan
from megatron_moe.training.build import start
from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.callbacks.evaluation import Evaluation
from megatron_moe.training.callbacks.metrics_file import MetricsFile
from megatron_moe.training.trainer import Trainer


def written_keys(folder: Path) -> set[str]:
    """Every key of the metrics.jsonl of a run whose last step cannot update the weights."""
    tiny = experiment(
        training={"train_iters": 2, "eval_interval": 1, "eval_iters": 1}, logging={"detail_interval": 1}
    )
    trainer = start(tiny, plan.make(tiny), folder)
    metrics = MetricsFile(folder / "metrics.jsonl")
    trainer.callbacks = [Evaluation(), _Spoil(), metrics]
    trainer.fit()
    return {key for line in metrics.path.read_text().splitlines() for key in json.loads(line)}


class _Spoil(Callback):
    """Makes every gradient of the next step NaN."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        with torch.no_grad():
            for parameter in trainer.chunks[0].parameters():
                parameter.fill_(float("nan"))
