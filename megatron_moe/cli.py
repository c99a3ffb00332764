"""The command line: parse, call one function, print. What a command does is imported only when it runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_moe import __version__

PROGRAM = "megatron-moe"
EXIT_CODES = (
    "Exit codes: 0 done; 2 the input is wrong; 75 saved after a termination signal,\n"
    "start me again; 1 anything else."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; the user's mistakes go to stderr, one a line."""
    from megatron_moe.config.errors import InputError, RunError, one_line

    args = _parse(argv)
    try:
        os.getcwd()
    except FileNotFoundError:
        print("The working directory was removed: change to a folder that is there.", file=sys.stderr)
        return 2
    try:
        code: int = args.run(args)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        return code
    except InputError as error:
        for problem in error.problems:
            print(one_line(problem), file=sys.stderr)
        return 2
    except RunError as error:
        print(one_line(str(error)), file=sys.stderr)
        return 1
    except OSError as error:
        # Whoever read our output is gone, or the file that it goes to has no room.
        if error.errno not in (errno.EPIPE, errno.ENOSPC) or error.filename is not None:
            raise
        if error.errno == errno.ENOSPC:
            print("The output cannot be written: no space left on its device.", file=sys.stderr)
        # Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand on both sides of options, which argparse alone cannot read."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    overrides = [other for other in others if "=" in other and not other.startswith("-")]
    if len(overrides) < len(others) or (overrides and "overrides" not in args):
        unknown = [other for other in others if other not in overrides] or overrides
        parser.error(f"{args.command} does not take {' '.join(unknown)}; see {PROGRAM} {args.command} --help")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, the function that does it."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train Mixture-of-Experts language models on Megatron-Core, from one YAML file.",
        epilog=f"{PROGRAM} COMMAND --help explains a command, with an example.\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _add_validate,
        _add_plan,
        _add_profile,
        _add_train,
        _add_verify,
        _add_preprocess,
        _add_doctor,
    ):
        add(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
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


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the experiment, a YAML file")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="set a key for this time, for example training.train_iters=20",
    )


def _add_validate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "validate",
        _validate,
        "check an experiment and print it in full",
        "Check everything about an experiment that can be checked without a GPU. Prints\n"
        "every mistake with its line, or the experiment as it would run, with every\n"
        "default filled in.",
        f"{PROGRAM} validate configs/quickstart.yaml --provenance",
    )
    _add_config(parser)
    parser.add_argument("--provenance", action="store_true", help="say behind each value where it came from")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "plan",
        _plan,
        "show which rank does what, before anything runs",
        "Show how an experiment lies on its ranks, what fits into their memory, how fast\n"
        "it will be, and what limits it. Needs no data, no tokenizer, no GPU and no torch.",
        f"{PROGRAM} plan configs/quickstart.yaml parallel.pipeline_model_parallel_size=2",
    )
    _add_config(parser)
    parser.add_argument(
        "--gpus", metavar="N", type=_positive_int, help="plan for this many ranks; data parallelism follows"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, and nothing else")
    _add_views(parser)
    _add_search(parser)
    _add_inference(parser)


def _add_views(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw the timeline of an iteration and the memory of each rank (.png, .svg or .pdf)",
    )
    add(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write the iteration pass by pass, for ui.perfetto.dev or chrome://tracing",
    )
    add("--schedules", action="store_true", help="compare with other pipeline schedules")
    add(
        "--against",
        metavar="RUN",
        type=Path,
        help="hold the forecast against what a run of this experiment measured, by its folder",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a better layout, instead of the experiment's own")
    add = group.add_argument
    add(
        "--search",
        action="store_true",
        help="find the ten fastest layouts of --gpus ranks, and print the first one as YAML",
    )
    add(
        "--memory",
        metavar="G",
        type=_positive_float,
        help="GiB of a GPU, in the place of launch.cluster.memory_gib",
    )
    add("--overlay", metavar="FILE", type=Path, help="write the first one as YAML that extends CONFIG")


def _add_inference(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serving, instead of training")
    add = group.add_argument
    add(
        "--inference",
        action="store_true",
        help="show what serving the model takes: weights, KV cache, GPUs (--gpus; default: as few as do)",
    )
    add("--batch", metavar="B", type=_positive_int, help="sequences at once (default: 1)")
    add("--context", metavar="S", type=_positive_int, help="tokens of each (default: training.seq_length)")
    add("--dtype", choices=("bf16", "fp8"), help="of the weights (default: bf16)")


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "profile",
        _profile,
        "measure the pieces of a model here, for the planner",
        "Measure on this machine what each kind of layer, the embedding and the loss head\n"
        "take, forward, backward and computed again, in time and memory, with as many\n"
        "ranks at once as training would start here. On GPUs, one stage's ranks. The\n"
        "planner then uses these numbers instead of its model. Needs no data.",
        f"{PROGRAM} profile configs/quickstart.yaml",
    )
    _add_config(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where to write them (default: profile.json in the run folder, where `plan` and `train` look)",
    )


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train an experiment, or go on with it",
        "Train an experiment. Alone, this starts the ranks itself on this machine; under\n"
        "torchrun or srun it is one of the ranks. A run that was interrupted goes on\n"
        "from its newest checkpoint; a finished one says so and is left as it is.",
        f"{PROGRAM} train configs/quickstart.yaml training.train_iters=20",
    )
    _add_config(parser)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
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
    _add_config(parser)
    parser.add_argument(
        "--steps", metavar="N", type=_positive_int, default=3, help="steps to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=_positive_float,
        help="largest relative difference at the first step (default: 1e-5, in bf16 5e-2)",
    )


def _add_preprocess(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "preprocess",
        _preprocess,
        "turn text, jsonl and parquet into token files",
        "Turn text (.txt) and jsonl, also .gz and .zst, and parquet files into\n"
        "Megatron's token files PREFIX.bin and PREFIX.idx.",
        f"{PROGRAM} preprocess --input corpus/tinyshakespeare.txt --documents paragraph \\\n"
        "    --output data/shakespeare --vocab-size 2048",
    )
    add = parser.add_argument
    add(
        "--input",
        metavar="FILE",
        nargs="+",
        required=True,
        help="files, folders, or globs such as 'web/**/*.jsonl.zst'",
    )
    add("--output", metavar="PREFIX", type=Path, required=True, help="where the token files go, without .bin")
    _add_tokenizer(parser)
    _add_records(parser)
    add(
        "--workers",
        metavar="N",
        type=_positive_int,
        help="processes to use (default: by cores and size of the input)",
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokenizer",
        choices=("sentencepiece", "huggingface", "tiktoken", "bytes"),
        default="sentencepiece",
        help="(default: %(default)s)",
    )
    add(
        "--tokenizer-model",
        metavar="FILE",
        type=Path,
        help="a sentencepiece model, a tokenizer.json or its folder, or tiktoken's ranks",
    )
    add(
        "--vocab-size",
        metavar="N",
        type=_positive_int,
        help="train a sentencepiece model of this size on the input",
    )
    add(
        "--eod",
        metavar="TOKEN",
        help="the token that ends a document (default: as the tokenizer's files say)",
    )
    add(
        "--pattern",
        metavar="NAME",
        help="how tiktoken cuts text: gpt2, cl100k_base (default), o200k_base, or an expression",
    )


def _add_records(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--json-key",
        metavar="KEY",
        default="text",
        help="key of a jsonl record, or column of a parquet file, that holds the text (default: %(default)s)",
    )
    add(
        "--documents",
        choices=("file", "line", "paragraph"),
        default="file",
        help="what one document is in a text file (default: %(default)s)",
    )
    add(
        "--bad-records",
        choices=("error", "skip"),
        default="error",
        help="stop at a record that cannot be read, or leave it out and count it (default: %(default)s)",
    )
    add("--no-append-eod", action="store_true", help="put no end-of-document token behind each document")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
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


def _positive_int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return number


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


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


def _plan(args: argparse.Namespace) -> int:
    from megatron_moe.config.loading import load
    from megatron_moe.plan.command import run

    _refuse_mixed(args)
    if args.inference:
        return _plan_inference(args)
    if args.search:
        return _plan_search(args)
    loaded = load(args.config, args.overrides, world_size=args.gpus)
    if args.against:
        from megatron_moe.plan import against

        against.run(loaded, args.against)
        return 0
    run(loaded, args.gpus, args.json, plot=args.plot, trace=args.trace, schedules=args.schedules)
    return 0


def _plan_search(args: argparse.Namespace) -> int:
    from megatron_moe.config.loading import load
    from megatron_moe.plan.search_command import run

    memory = [f"launch.cluster.memory_gib={args.memory}"] if args.memory else []
    loaded = load(args.config, [*args.overrides, *memory])
    run(loaded, args.config, args.gpus, args.json, args.overlay)
    return 0


def _plan_inference(args: argparse.Namespace) -> int:
    from megatron_moe.config.loading import load
    from megatron_moe.plan.inference_table import run

    loaded = load(args.config, args.overrides)
    run(loaded, args.gpus, args.json, batch=args.batch or 1, context=args.context, dtype=args.dtype or "bf16")
    return 0


def _refuse_mixed(args: argparse.Namespace) -> None:
    """Options of `plan` that do not go together."""
    from megatron_moe.config.errors import InputError

    of_training = [name for name in ("plot", "trace", "schedules") if getattr(args, name)]
    of_serving = [name for name in ("batch", "context", "dtype") if getattr(args, name)]
    if args.inference and of_training:
        raise InputError(f"--inference does not go with --{of_training[0]}: leave one of them out")
    if of_serving and not args.inference:
        raise InputError(f"--{of_serving[0]} goes with --inference only")
    of_search = [name for name in ("memory", "overlay") if getattr(args, name)]
    if of_search and not args.search:
        raise InputError(f"--{of_search[0]} goes with --search only")
    if args.search and args.inference:
        raise InputError("--search does not go with --inference: leave one of them out")
    if args.search and of_training:
        raise InputError(f"--search does not go with --{of_training[0]}: leave one of them out")
    if args.search and args.gpus is None:
        raise InputError("--search needs --gpus, the number of ranks to lay the experiment over")
    beside = [name for name in ("search", "inference", *of_training, "json") if getattr(args, name)]
    if args.against and beside:
        raise InputError(f"--against does not go with --{beside[0]}: leave one of them out")
    if args.json and args.schedules:
        raise InputError("--schedules is a table: leave --json out")


def _profile(args: argparse.Namespace) -> int:
    from megatron_moe.launch.profile_command import profile

    return profile(args.config, args.overrides, args.output)


def _train(args: argparse.Namespace) -> int:
    from megatron_moe.launch.command import train

    return train(args.config, args.overrides)


def _verify(args: argparse.Namespace) -> int:
    from megatron_moe.launch.command import verify

    return verify(args.config, args.overrides, steps=args.steps, tolerance=args.tolerance)


def _preprocess(args: argparse.Namespace) -> int:
    from megatron_moe.data.command import run

    run(
        args.input,
        args.output,
        kind=args.tokenizer,
        model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        eod=args.eod,
        pattern=args.pattern,
        json_key=args.json_key,
        documents=args.documents,
        append_eod=not args.no_append_eod,
        bad_records=args.bad_records,
        workers=args.workers,
    )
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from megatron_moe.launch.doctor import run

    return run(args.json)
