"""The command `preprocess`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, command, positive_int


def add_preprocess(commands: Commands) -> None:
    parser = command(
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
        type=positive_int,
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
        type=positive_int,
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
