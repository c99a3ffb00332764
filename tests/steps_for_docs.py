"""Runs on a rank for `test_docs`: which keys does a run write?"""

from __future__ import annotations

import json
from pathlib import Path

from experiments import MOE, experiment

from megatron_moe.engine import groups
from megatron_moe.plan import plan
from megatron_moe.training.build import start
from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.callbacks.evaluation import Evaluation
from megatron_moe.training.callbacks.metrics_file import MetricsFile
from megatron_moe.training.trainer import Trainer

LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_z_loss_coeff": {"xi": 0.2},
}
NAMES = {
    **dict.fromkeys(("eval/loss/one", "eval/loss/other"), "eval/loss/<name>"),
    **dict.fromkeys(("moe/loss/aux_loss", "moe/loss/seq_aux_loss"), "moe/loss/<name>"),
    **dict.fromkeys(
        ("moe/per_layer/seq_aux_loss_coeff", "moe/per_layer/z_loss_coeff"), "moe/per_layer/<name>_coeff"
    ),
}
"""Keys that have a name in them, as the page writes them."""


def written_keys(folder: Path) -> set[str]:
    """Every key of the metrics.jsonl of runs, over one text, over two and over records, whose last step
    cannot update the weights."""
    (folder / "text.txt").write_text("".join(f"line {number}\n" for number in range(500)))
    prepare = {"prepare": {"input": [str(folder / "text.txt")], "documents": "line"}}
    written: set[str] = set()
    record = json.dumps({"question": "x", "answer": "y"})
    (folder / "records.jsonl").write_text(f"{record}\n" * 100)
    records = {"kind": "instruction", "instruction": {"train": [str(folder / "records.jsonl")]}}
    for number, sources in enumerate((prepare, {"blend": {"one": prepare, "other": prepare}}, records)):
        tiny = experiment(
            model={"vocab_size": 300, "mtp_num_layers": 2 * (number == 1)},
            training={
                "train_iters": 2,
                "eval_interval": 1,
                "eval_iters": 1,
                "rampup_batch_size": [4, 4, 8] if number else None,
            },
            moe=MOE | {"moe_eval_capacity_factor": 2.0} | (LOSSES if number else {}),
            optimizer={"lr": 1e-2, "decoupled_lr": 1e-3, "expert_lr": 1e-3},
            logging={"root": str(folder / "runs"), "detail_interval": 1, "expert_similarity": True},
            data={"tokenizer": {"kind": "bytes"}, **sources},
        )
        trainer = start(tiny, plan.make(tiny), folder)
        metrics = MetricsFile(folder / f"{number}.jsonl", folder / "log.txt")
        trainer.callbacks = [Evaluation(), _Spoil(), metrics]
        trainer.fit()
        groups.destroy()
        written |= {key for line in metrics.path.read_text().splitlines() for key in json.loads(line)}
    return {NAMES.get(key, key) for key in written}


class _Spoil(Callback):
    """Makes a gradient of the next step NaN."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        next(trainer.chunks[0].parameters()).register_hook(lambda gradient: gradient * float("nan"))
