"""The command line: parse, call one function, print. What a command does is imported only when it runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from megatron_moe import __version__
from megatron_moe.cli.arguments import PROGRAM
from megatron_moe.cli.checkpoints import add_checkpoint
from megatron_moe.cli.converting import add_export, add_import
from megatron_moe.cli.evaluating import add_eval
from megatron_moe.cli.inference import add_generate
from megatron_moe.cli.planning import add_plan, add_profile
from megatron_moe.cli.preprocessing import add_preprocess
from megatron_moe.cli.training import add_doctor, add_train, add_validate, add_verify
from megatron_moe.cli.upcycling import add_upcycle

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
        add_validate,
        add_plan,
        add_profile,
        add_train,
        add_verify,
        add_preprocess,
        add_import,
        add_export,
        add_upcycle,
        add_checkpoint,
        add_generate,
        add_eval,
        add_doctor,
    ):
        add(commands)
    return parser
