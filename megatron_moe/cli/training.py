"""The commands `validate`, `train`, `verify` and `doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, add_config, command, positive_float, positive_int


def add_validate(commands: Commands) -> None:
    parser = command(
        commands,
        "validate",
        _validate,
        "check an experiment and print it in full",
        "Check everything about an experiment that can be checked without a GPU. Prints\n"
        "every mistake with its line, or the experiment as it would run, with every\n"
        "default filled in.",
        f"{PROGRAM} validate configs/quickstart.yaml --provenance",
    )
    add_config(parser)
    parser.add_argument("--provenance", action="store_true", help="say behind each value where it came from")


def add_train(commands: Commands) -> None:
    parser = command(
        commands,
        "train",
        _train,
        "train an experiment, or go on with it",
        "Train an experiment. Alone, this starts the ranks itself on this machine; under\n"
        "torchrun or srun it is one of the ranks. A run that was interrupted goes on\n"
        "from its newest checkpoint; a finished one says so and is left as it is.",
        f"{PROGRAM} train configs/quickstart.yaml training.train_iters=20",
    )
    add_config(parser)


def add_verify(commands: Commands) -> None:
    parser = command(
        commands,
        "verify",
        _verify,
        "prove that a layout computes what one process computes",
        "Train a few steps under the experiment's layout, and again in one process from\n"
        "the same weights and batches, and compare losses, gradients and updated\n"
        "weights. Exit code 1 if they differ.\n\n"
        "The tolerance X holds for loss, gradient norm and every tensor's gradient at\n"
        "the first step. Adam makes rounding grow: updates, and the gradients after\n"
        "them, may differ by sqrt(X), later losses and gradient norms by 10 X. In bf16\n"
        "only the first step is held against X. Dropout is off.",
        f"{PROGRAM} verify configs/quickstart.yaml --steps 3",
    )
    add_config(parser)
    parser.add_argument(
        "--steps", metavar="N", type=positive_int, default=3, help="steps to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=positive_float,
        help="largest relative difference at the first step (default: 1e-5, in bf16 5e-2)",
    )


def add_doctor(commands: Commands) -> None:
    parser = command(
        commands,
        "doctor",
        _doctor,
        "say what this machine has, and what would make it faster",
        "Look at versions, devices and limits of this machine: first what is wrong, then\n"
        "which fast paths training has here, what takes the place of the missing ones,\n"
        "and how to get them. Exit code 1 if nothing can be trained here, or not on the\n"
        "GPUs that are here.",
        f"{PROGRAM} doctor",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, and nothing else")


def _validate(args: argparse.Namespace) -> int:
    from megatron_moe.config.dump import to_yaml
    from megatron_moe.config.errors import ConfigError
    from megatron_moe.config.input_files import missing_files
    from megatron_moe.config.loading import load
    from megatron_moe.launch import preflight
    from megatron_moe.plan.auto import resolve

    loaded = resolve(load(args.config, args.overrides))
    if missing := missing_files(loaded):
        raise ConfigError(*missing)
    if loaded.experiment.data.tokenizer.model is not None:
        from megatron_moe.data.from_text import check_tokenizer

        check_tokenizer(loaded.experiment.data.tokenizer)
    print(f"# {args.config} is valid. In full, as it would run:")
    print(f"# Run folder: {Path(loaded.experiment.logging.root) / loaded.experiment.name}")
    for note in preflight.notes(loaded):
        print(f"# It cannot run on this machine as it is: {note}")
    print(to_yaml(loaded.experiment, loaded.provenance if args.provenance else None), end="")
    return 0


def _train(args: argparse.Namespace) -> int:
    from megatron_moe.launch.command import train

    return train(args.config, args.overrides)


def _verify(args: argparse.Namespace) -> int:
    from megatron_moe.launch.command import verify

    return verify(args.config, args.overrides, steps=args.steps, tolerance=args.tolerance)


def _doctor(args: argparse.Namespace) -> int:
    from megatron_moe.launch.doctor import run

    return run(args.json)
