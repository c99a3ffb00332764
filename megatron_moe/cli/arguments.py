"""What the parsers of commands share: how one is made, and the types of their numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

PROGRAM = "megatron-moe"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where commands are added."""


def command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the experiment, a YAML file")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="set a key for this time, for example training.train_iters=20",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """What is run, laid out how, and in which precision."""
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="folder of a model, a checkpoint or a run")
    add(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="its layout, for example parallel.tensor_model_parallel_size=2",
    )
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp8"),
        default="auto",
        help="of weights and products (default: bf16 on a GPU, else fp32); fp8: linear layers and experts in "
        "memory",
    )


def positive_int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return number


def positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number
