"""The commands `plan` and `profile`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, add_config, command, positive_float, positive_int


def add_plan(commands: Commands) -> None:
    parser = command(
        commands,
        "plan",
        _plan,
        "show which rank does what, before anything runs",
        "Show how an experiment lies on its ranks, what fits into their memory, how fast\n"
        "it will be, and what limits it. Needs no data, no tokenizer, no GPU and no torch.",
        f"{PROGRAM} plan configs/quickstart.yaml parallel.pipeline_model_parallel_size=2",
    )
    add_config(parser)
    parser.add_argument(
        "--gpus", metavar="N", type=positive_int, help="plan for this many ranks; data parallelism follows"
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
        type=positive_float,
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
    add("--batch", metavar="B", type=positive_int, help="sequences at once (default: 1)")
    add("--context", metavar="S", type=positive_int, help="tokens of each (default: training.seq_length)")
    add("--dtype", choices=("bf16", "fp8"), help="of the weights (default: bf16)")


def add_profile(commands: Commands) -> None:
    parser = command(
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
    add_config(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where to write them (default: profile.json in the run folder, where `plan` and `train` look)",
    )


def _plan(args: argparse.Namespace) -> int:
    from megatron_moe.config.loading import load
    from megatron_moe.plan.show.command import run
    from megatron_moe.plan.show.output_file import check_output

    _refuse_mixed(args)
    for name in ("plot", "trace", "overlay"):
        if path := getattr(args, name):
            check_output(f"--{name}", path, args.config)
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
    from megatron_moe.plan.show.search_command import run

    memory = [f"launch.cluster.memory_gib={args.memory}"] if args.memory else []
    loaded = load(args.config, [*args.overrides, *memory])
    run(loaded, args.config, args.gpus, args.json, args.overlay)
    return 0


def _plan_inference(args: argparse.Namespace) -> int:
    from megatron_moe.config.loading import load
    from megatron_moe.plan.show.inference_table import run

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
    from megatron_moe.plan.show.output_file import check_output

    if args.output:
        check_output("--output", args.output, args.config, makes_folder=True)
    return profile(args.config, args.overrides, args.output)
