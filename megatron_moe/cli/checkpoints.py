"""The command `checkpoint` and what it can do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, command, positive_float


def add_checkpoint(commands: Commands) -> None:
    parser = command(
        commands,
        "checkpoint",
        _checkpoint,
        "look at models, compare them, make others of them",
        "Models as sets of weights. MODEL is a checkpoint, a run (its newest), an imported\n"
        "or a Hugging Face folder; OUT is a checkpoint folder, which trains, generates and\n"
        "is exported as any other.",
        f"{PROGRAM} checkpoint average OUT runs/a runs/b --shares 0.75 0.25",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = _action(actions, "show", _show, "list the weights of a model")
    one.add_argument("model", metavar="MODEL", type=Path)
    two = _action(actions, "diff", _diff, "compare two models; exit code 1 where they differ")
    two.add_argument("one", metavar="MODEL", type=Path)
    two.add_argument("other", metavar="OTHER", type=Path)
    mean = _action(actions, "average", _average, "the mean of models of one shape")
    mean.add_argument("out", metavar="OUT", type=Path)
    mean.add_argument("models", metavar="MODEL", type=Path, nargs="+")
    mean.add_argument("--shares", metavar="X", type=positive_float, nargs="+", help="default: alike")
    kind = _action(actions, "cast", _cast, "a model in another precision")
    kind.add_argument("model", metavar="MODEL", type=Path)
    kind.add_argument("out", metavar="OUT", type=Path)
    kind.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), required=True)
    dense = _action(
        actions, "dense", _dense, "a dense model of a mixture: one expert in each layer, or the mean"
    )
    dense.add_argument("model", metavar="MODEL", type=Path)
    dense.add_argument("out", metavar="OUT", type=Path)
    which = dense.add_mutually_exclusive_group(required=True)
    which.add_argument("--expert", metavar="N", type=int, help="its number, from 0")
    which.add_argument("--mean", action="store_true", help="the mean of all experts")
    part = _action(actions, "extract", _extract, "some weights as a safetensors file, such as one expert")
    part.add_argument("model", metavar="MODEL", type=Path)
    part.add_argument("out", metavar="OUT.safetensors", type=Path)
    part.add_argument("patterns", metavar="NAME", nargs="+", help="a name, or with * and ?: '*.experts.3.*'")
    name = _action(actions, "rename", _rename, "a model whose weights lie under other names")
    name.add_argument("model", metavar="MODEL", type=Path)
    name.add_argument("out", metavar="OUT", type=Path)
    name.add_argument("renames", metavar="EXPRESSION=NAME", nargs="+", help="as re.sub has them")


def _action(
    actions: Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(act=run)
    return parser


def _checkpoint(args: argparse.Namespace) -> int:
    code: int = args.act(args)
    return code


def _show(args: argparse.Namespace) -> int:
    from megatron_moe.convert.checkpoint_tools import show

    show(args.model)
    return 0


def _diff(args: argparse.Namespace) -> int:
    from megatron_moe.convert.difference import show_difference

    return 0 if show_difference(args.one, args.other) else 1


def _average(args: argparse.Namespace) -> int:
    from megatron_moe.convert.checkpoint_tools import average

    average(args.models, args.out, args.shares)
    return 0


def _cast(args: argparse.Namespace) -> int:
    from megatron_moe.convert.checkpoint_tools import cast

    cast(args.model, args.out, args.dtype)
    return 0


def _dense(args: argparse.Namespace) -> int:
    from megatron_moe.config.errors import InputError
    from megatron_moe.convert.checkpoint_tools import dense

    if args.expert is not None and args.expert < 0:
        raise InputError(f"--expert {args.expert}: experts are counted from 0")
    dense(args.model, args.out, None if args.mean else args.expert)
    return 0


def _extract(args: argparse.Namespace) -> int:
    from megatron_moe.convert.checkpoint_tools import extract

    extract(args.model, args.out, args.patterns)
    return 0


def _rename(args: argparse.Namespace) -> int:
    import re

    from megatron_moe.config.errors import InputError
    from megatron_moe.convert.checkpoint_tools import rename

    pairs = [tuple(rename.split("=", 1)) for rename in args.renames]
    for given, pair in zip(args.renames, pairs, strict=True):
        try:
            if len(pair) != 2:
                raise InputError(f"{given}: write EXPRESSION=NAME, for example '^model\\.=decoder.'")
            re.compile(pair[0])
        except re.error as error:
            raise InputError(f"{given}: is no regular expression: {error}") from None
    rename(args.model, args.out, [(old, new) for old, new in pairs])
    return 0
