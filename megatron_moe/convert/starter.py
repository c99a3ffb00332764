"""The experiment that an import makes of a config.json: what the model is, and a beginning of finetuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moe.config.dump import flow
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.models import HUGGINGFACE, tokenizer_in

_LENGTH = 2048
"""Tokens a sequence to begin with: what a model can read is often more than a machine can train."""


def starter_yaml(source: Path, experiment: Experiment, sections: dict[str, Any], origin: str) -> str:
    """A commented experiment that trains the model, to be written into its folder.

    Args:
        source: the folder that the model came in, with its tokenizer.
        origin: what the model is, in words.
    """
    length = min(_LENGTH, sections["model"].get("max_position_embeddings", _LENGTH))
    tokenizer = tokenizer_in(source)
    lines = [
        f"# {origin}. Say in `data` what to train it on, then:",
        "#   megatron-moe train experiment.yaml",
        "",
        f"name: {flow(experiment.name)}",
        "",
        *_section("model", sections["model"]),
        *(_section("moe", sections["moe"]) if sections.get("moe") else []),
        "checkpoint:",
        "  initialize_from: .            # the weights in this folder; optimizer and data begin anew",
        "",
        "data:",
    ]
    if tokenizer is not None:
        assert tokenizer.model is not None
        lines += [
            "  tokenizer:",
            f"    kind: {tokenizer.kind}",
            f"    model: {flow(f'{HUGGINGFACE}/{Path(tokenizer.model).name}')}",
            "  prepare:",
            "    input: [texts.txt]          # yours: .txt, jsonl or parquet files, or folders of them",
        ]
    else:
        lines += ["  kind: mock                    # no tokenizer came with the model: name yours, and texts"]
    lines += [
        "",
        "optimizer:",
        "  lr: 1.0e-5",
        "",
        "training:",
        "  train_iters: 100",
        "  global_batch_size: 32",
        "  micro_batch_size: 1",
        f"  seq_length: {length}            # at most {experiment.model.max_position_embeddings}",
        "",
        "# Over several ranks, for example:",
        "# parallel:",
        "#   tensor_model_parallel_size: 2",
        "#   pipeline_model_parallel_size: 2",
    ]
    return "\n".join(lines) + "\n"


def _section(name: str, values: dict[str, Any]) -> list[str]:
    return [f"{name}:", *(f"  {key}: {flow(value)}" for key, value in values.items()), ""]
