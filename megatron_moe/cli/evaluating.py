"""The command `eval`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, add_model, command, positive_float, positive_int

_OVERRIDE = re.compile(r"(parallel|pipeline)\.[\w.]+=")


def add_eval(commands: Commands) -> None:
    parser = command(
        commands,
        "eval",
        _eval,
        "measure a model on text and tasks",
        "Measure any model: a Hugging Face folder, an imported one, a checkpoint or a run.\n"
        "Its loss on text, multiple choice, exact match, likelihood of answers, programs\n"
        "that pass their tests (in a sandbox), and how close it is to transformers.\n"
        "Ranks are started here, as many as the layout has; it changes none of the numbers.",
        f"{PROGRAM} eval runs/quickstart --text data/held_out.jsonl --task configs/tasks/gsm8k.yaml",
    )
    add = parser.add_argument
    add_model(parser)
    _add_text(parser)
    _add_tasks(parser)
    add("--limit", metavar="N", type=positive_int, help="only the first N records or documents of each")
    add("--batch", metavar="N", type=positive_int, default=8, help="texts to generate at once (default: 8)")
    add("--output", metavar="FILE", type=Path, help="write the results as JSON to this file, too")
    add("--json", action="store_true", help="print them as JSON, and nothing else")
    add("--records", action="store_true", help="with what was asked and answered, sample by sample")


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss on text").add_argument
    add(
        "--text",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="files, folders or globs of .txt (each a document), .jsonl or .parquet; a row of results each",
    )
    add("--json-key", metavar="KEY", default="text", help="key or column of the text (default: %(default)s)")
    add("--length", metavar="N", type=positive_int, help="tokens of a window (default: as it was trained)")
    add(
        "--stride", metavar="N", type=positive_int, help="tokens that each further one scores (default: half)"
    )
    add(
        "--against",
        metavar="HF_DIR",
        type=Path,
        help="hold loss, logits and greedy text against transformers' model in this folder",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tasks").add_argument
    add(
        "--task",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="YAML files that say what is asked: see configs/tasks",
    )
    add("--chat", action="store_true", help="ask in the form that the model's chat template gives")
    add("--samples", metavar="N", type=positive_int, help="programs a record")
    add("--k", metavar="K", type=positive_int, nargs="+", help="of pass@k")
    add("--temperature", metavar="T", type=positive_float, help="with which programs are drawn")
    add("--top-p", metavar="P", type=_share, help="of the likeliest tokens with this probability together")
    add("--seed", metavar="N", type=int, default=0, help="of the draws (default: %(default)s)")


def _share(text: str) -> float:
    number = positive_float(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, not {text}")
    return number


def _eval(args: argparse.Namespace) -> int:
    from megatron_moe.launch.eval_command import Request, evaluate

    texts, tasks, overrides = list[str](), list[str](), list[str](args.overrides)
    # Behind an option that takes several files, overrides are taken for further ones.
    for given, kept in ((args.text, texts), (args.task, tasks)):
        for entry in given:
            (overrides if _OVERRIDE.match(entry) else kept).append(entry)
    return evaluate(
        Request(
            model=args.model,
            overrides=overrides,
            tasks=[Path(task) for task in tasks],
            texts=texts,
            json_key=args.json_key,
            length=args.length,
            stride=args.stride,
            chat=args.chat,
            limit=args.limit,
            samples=args.samples,
            k=args.k,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            against=args.against,
            batch=args.batch,
            dtype=args.dtype,
            output=args.output,
            with_records=args.records,
            as_json=args.json,
        )
    )
