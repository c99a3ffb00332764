"""The command `generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, add_model, command, positive_int


def add_generate(commands: Commands) -> None:
    parser = command(
        commands,
        "generate",
        _generate,
        "continue prompts with a model",
        "Continue texts, or answer as a chat, with any model: a Hugging Face folder, an\n"
        "imported one, a checkpoint or a run. Streams to the terminal. Without\n"
        "--temperature it always takes the most likely token. Ranks are started here,\n"
        "as many as the layout has; it changes nothing of the text.",
        f'{PROGRAM} generate runs/quickstart --prompt "O Romeo" --max-new-tokens 100',
    )
    add = parser.add_argument
    add_model(parser)
    _add_prompts(parser)
    _add_choice(parser)
    add(
        "--logit-error", action="store_true", help="with --dtype fp8, say what it does to the prompts' logits"
    )
    add("--batch", metavar="N", type=positive_int, default=8, help="prompts at once (default: %(default)s)")
    add("--output", metavar="FILE", type=Path, help="write a JSON object a prompt to this file, too")
    add("--json", action="store_true", help="print these, and nothing else")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts (default: standard input)").add_argument
    add("--prompt", metavar="TEXT", action="append", default=[], help="a text to continue; may be repeated")
    add(
        "--file",
        metavar="FILE",
        type=Path,
        help="a prompt a line, or a .jsonl file with the key prompt or messages",
    )
    add("--chat", action="store_true", help="answer them, in the form that the model's chat template gives")
    add("--system", metavar="TEXT", help="with --chat, what the model is told before")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what comes next").add_argument
    add("--max-new-tokens", metavar="N", type=positive_int, default=256, help="(default: %(default)s)")
    add(
        "--temperature",
        metavar="T",
        type=_not_negative,
        default=0.0,
        help="draw tokens, by logits over T; 0 takes the most likely one (default)",
    )
    add("--top-k", metavar="K", type=positive_int, help="of the K most likely ones")
    add(
        "--top-p",
        metavar="P",
        type=_share,
        default=1.0,
        help="of the most likely ones with this probability together",
    )
    add("--seed", metavar="N", type=int, default=0, help="of the draws (default: %(default)s)")
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text; may be repeated",
    )


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text}")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, not {text}")
    return number


def _generate(args: argparse.Namespace) -> int:
    from megatron_moe.config.errors import InputError
    from megatron_moe.launch.generate_command import Request, generate

    if args.system is not None and not args.chat:
        raise InputError("--system goes with --chat only")
    if "" in args.stop:
        raise InputError("--stop: is empty; give it some text")
    return generate(
        Request(
            model=args.model,
            overrides=args.overrides,
            texts=args.prompt,
            file=args.file,
            chat=args.chat,
            system=args.system,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            stops=args.stop,
            batch=args.batch,
            dtype=args.dtype,
            logit_error=args.logit_error,
            output=args.output,
            as_json=args.json,
        )
    )
