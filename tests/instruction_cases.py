"""A tiny experiment on records, over bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import experiment

from megatron_moe.config.schema import Experiment

RECORDS = [
    (f"What is {n} {'and' * (n % 5)} {n * n}?", "It is " + "quite " * (n % 4) + f"{n + n * n}.")
    for n in range(48)
]
"""Prompts and answers of many lengths."""


def instruction_experiment(folder: Path, **sections: Any) -> Experiment:
    """Keys of data.instruction, `split`, and sections of the experiment, all merged over the defaults."""
    train = folder / "records.jsonl"
    train.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in RECORDS))
    known = ("moe", "parallel", "model", "training", "recompute", "pipeline", "optimizer", "name")
    of_experiment = {name: sections.pop(name) for name in known if name in sections}
    split = sections.pop("split", None)
    data: dict[str, Any] = {
        "kind": "instruction",
        "instruction": {"train": [str(train)], **sections},
        "tokenizer": {"kind": "bytes"},
    }
    if split is not None or "validation" not in sections:
        data["split"] = split or [100, 0]
    return experiment(
        **{
            **of_experiment,
            "model": {"vocab_size": 257, **of_experiment.get("model", {})},
            "data": data,
            "logging": {"root": str(folder / "runs")},
        }
    )
