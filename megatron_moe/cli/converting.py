"""The commands `import` and `export`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, command, positive_int

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def add_import(commands: Commands) -> None:
    parser = command(
        commands,
        "import",
        _import,
        "make a checkpoint of a Hugging Face folder",
        "Convert a model of Hugging Face, its safetensors files and config.json, to a\n"
        "checkpoint that trains, generates and is evaluated in any layout. Memory is\n"
        "bounded by its largest tensors. What comes with it, tokenizer and config.json,\n"
        "is kept in OUT/huggingface. OUT/experiment.yaml is an experiment to finetune it.",
        f"{PROGRAM} import Qwen3-0.6B checkpoints/qwen3",
    )
    add = parser.add_argument
    add("source", metavar="HF_DIR", type=Path, help="the folder with config.json and model*.safetensors")
    add("out", metavar="OUT", type=Path, help="the checkpoint folder to make")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the weights (default: as they are, from FP8 bf16)",
    )
    add(
        "--config",
        dest="experiment",
        metavar="CONFIG",
        type=Path,
        help="an experiment of yours: stop where its model is not the one that config.json describes",
    )
    _add_workers(parser)


def add_export(commands: Commands) -> None:
    parser = command(
        commands,
        "export",
        _export,
        "make a Hugging Face folder of a checkpoint",
        "Convert a checkpoint, or a run's newest one, to a folder that transformers and\n"
        "other programs open: config.json, safetensors files, tokenizer. Adapters (LoRA)\n"
        "are added to the weights.",
        f"{PROGRAM} export runs/my-run my-model",
    )
    add = parser.add_argument
    add("source", metavar="CKPT", type=Path, help="a checkpoint, an imported folder, or a run")
    add("out", metavar="HF_DIR", type=Path, help="the folder to make")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "fp8"),
        help="precision of the weights; fp8: linear layers and experts with a scale a block of 128 x 128, "
        "all else bf16 (default: as they are)",
    )
    add(
        "--family",
        metavar="NAME",
        help="write it as this family, such as llama or mixtral (default: the one that it came in, or the "
        "first that fits)",
    )
    add(
        "--max-shard-size",
        metavar="SIZE",
        type=_bytes,
        default=_bytes("5GB"),
        help="most bytes of a file, such as 500MB (default: 5GB)",
    )
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", metavar="N", type=positive_int, help="processes to use (default: by the model's size)"
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]I?)?B?", text.upper())
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, not {text}")
    return int(match[1]) * _UNITS[match[2] or ""]


def _import(args: argparse.Namespace) -> int:
    from megatron_moe.convert.importing import import_model

    import_model(args.source, args.out, args.dtype, args.experiment, args.workers)
    return 0


def _export(args: argparse.Namespace) -> int:
    from megatron_moe.config.errors import InputError
    from megatron_moe.convert.exporting import export_model
    from megatron_moe.convert.families import FAMILIES

    if args.family is not None and args.family not in FAMILIES:
        raise InputError(f"--family {args.family}: is not known; known ones: {', '.join(FAMILIES)}")
    export_model(args.source, args.out, args.dtype, args.family, args.max_shard_size, args.workers)
    return 0
