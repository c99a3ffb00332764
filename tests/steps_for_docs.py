"""Runs on a rank for `test_docs`: which keys does a run write?"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from experiments import experiment

from megatron_moe.engine import groups
from megatron_moe.plan import plan
from megatron_moe.training.build import start
from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.callbacks.evaluation import Evaluation
from megatron_moe.training.callbacks.metrics_file import MetricsFile
from megatron_moe.training.trainer import Trainer


def written_keys(folder: Path) -> set[str]:
    """Every key of the metrics.jsonl of runs, over one text and over two, whose last step cannot update the
    weights."""
    (folder / "text.txt").write_text("".join(f"line {number}\n" for number in range(500)))
    prepare = {"prepare": {"input": [str(folder / "text.txt")], "documents": "line"}}
    written: set[str] = set()
    for number, sources in enumerate((prepare, {"blend": {"one": prepare, "other": prepare}})):
        tiny = experiment(
            model={"vocab_size": 300},
            training={
                "train_iters": 2,
                "eval_interval": 1,
                "eval_iters": 1,
                "rampup_batch_size": [4, 4, 8] if number else None,
            },
            optimizer={"lr": 1e-2, "decoupled_lr": 1e-3, "expert_lr": 1e-3},
            logging={"root": str(folder / "runs"), "detail_interval": 1},
            data={"tokenizer": {"kind": "bytes"}, **sources},
        )
        trainer = start(tiny, plan.make(tiny), folder)
        metrics = MetricsFile(folder / f"{number}.jsonl", folder / "log.txt")
        trainer.callbacks = [Evaluation(), _Spoil(), metrics]
        trainer.fit()
        groups.destroy()
        written |= {key for line in metrics.path.read_text().splitlines() for key in json.loads(line)}
    return {key.replace("/one", "/<name>") for key in written} - {"eval/loss/other"}


class _Spoil(Callback):
    """Makes every gradient of the next step NaN."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        with torch.no_grad():
            for parameter in trainer.chunks[0].parameters():
                parameter.fill_(float("nan"))
