"""Measure how fast text becomes token files, against the method of Megatron-LM's own tool, and print the
table of docs/benchmarks.md.

Its method: a pool of worker processes; for each document a worker parses the JSON, encodes the text and sends
back a list of ids; the parent adds the list to Megatron-Core's IndexedDatasetBuilder. Both methods have the
same tokenizer library and number of workers, take turns, and must write the same bytes. Times hold everything
from the start of the worker processes to the finished files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.data.tokenizers import Tokenizer, load_tokenizer

# Our worker processes import this file anew, as they do the command line: what they don't need is imported
# where it is used.

SHAKESPEARE = Path(__file__).parents[1] / "corpus" / "tinyshakespeare.txt"
VOCAB_SIZE = 16384
PEERS_CHUNK = 32
"""Documents that Megatron-LM's tool hands to a worker at once."""
COLUMNS = ("tokenizer", "measured", "by the clock", "by processor time")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, help="jsonl with the key text (default: made of corpus/tinyshakespeare.txt)")
    add("--megabytes", type=int, default=50, help="size of the corpus that is made (default: 50)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--rounds", type=int, default=5, help="of each measurement (default: 5)")
    add("--kinds", nargs="+", default=list(TOKENIZERS), choices=list(TOKENIZERS), help="default: all")
    add("--tokenizer-json", type=Path, help="take this Hugging Face tokenizer (default: one trained here)")
    args = parser.parse_args(argv)
    print(_versions(args.workers), flush=True)
    with tempfile.TemporaryDirectory(prefix="megatron-moe-benchmark-") as folder:
        corpus = args.input or write_corpus(Path(folder, "corpus.jsonl"), args.megabytes << 20)
        rows = []
        for kind in args.kinds:
            tokenizer = TOKENIZERS[kind](Path(folder), args.tokenizer_json)
            rows += _rows(
                kind, corpus.stat().st_size / 1e6, in_turns(tokenizer, corpus, args.workers, args.rounds)
            )
    print("\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)))
    return 0


def write_corpus(path: Path, size: int) -> Path:
    """Documents of some 2 kB: speeches of the plays, in another order each time, every tenth word replaced by
    one that is made up, so that no copy is the same."""
    speeches = SHAKESPEARE.read_text(encoding="utf-8").split("\n\n")
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < size:
            words = "\n\n".join(chance.choices(speeches, k=15)).split(" ")
            for at in range(chance.randrange(10), len(words), 10):
                words[at] = "".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9)))
            stream.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def _trained_json(folder: Path, given: Path | None) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if given is not None:
        return load_tokenizer("huggingface", given)
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.train([str(SHAKESPEARE)], trainer)
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer("huggingface", folder / "tokenizer.json", eod="<|endoftext|>")


def _trained_sentencepiece(folder: Path, given: Path | None) -> Tokenizer:
    from megatron_moe.data.tokenizer_training import train_sentencepiece

    with contextlib.redirect_stderr(io.StringIO()):
        train_sentencepiece([str(SHAKESPEARE)], VOCAB_SIZE // 2, folder / "spm.model")
    return load_tokenizer("sentencepiece", folder / "spm.model")


TOKENIZERS: dict[str, Callable[[Path, Path | None], Tokenizer]] = {
    "huggingface": _trained_json,
    "sentencepiece": _trained_sentencepiece,
    "bytes": lambda folder, given: load_tokenizer("bytes", None),
}


def in_turns(
    tokenizer: Tokenizer, corpus: Path, workers: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Method -> seconds by the clock, and of processor time, of each round. Both write the same tokens."""
    import_module("megatron.core.datasets.indexed_dataset")  # takes seconds, which are not to be counted
    methods = {"Megatron-LM's": pool_of_documents, "ours": _ours}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    with tempfile.TemporaryDirectory(prefix="megatron-moe-benchmark-") as folder:
        for _ in range(rounds):
            for name, method in methods.items():
                clock, processor = time.perf_counter(), _processor_s()
                method(tokenizer, corpus, Path(folder, name), workers)
                found[name].append((time.perf_counter() - clock, _processor_s() - processor))
            theirs, ours = (Path(folder, f"{name}.bin").read_bytes() for name in methods)
            if theirs != ours:
                raise RuntimeError("the two methods wrote different tokens")
    return found


def _ours(tokenizer: Tokenizer, corpus: Path, prefix: Path, workers: int) -> None:
    from megatron_moe.data.preprocess import preprocess

    with contextlib.redirect_stderr(io.StringIO()):
        preprocess([str(corpus)], prefix, tokenizer, workers=workers)


@dataclass
class _Peer:
    """What a worker of the other method holds."""

    encode: Callable[[str], list[int]]
    eod: int


_peer: _Peer


def pool_of_documents(tokenizer: Tokenizer, corpus: Path, prefix: Path, workers: int) -> None:
    """Token files by the method of Megatron-LM's tool."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_moe.data.indexed import token_dtype

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(tokenizer.vocab_size))
    with (
        corpus.open(encoding="utf-8") as lines,
        multiprocessing.Pool(workers, initializer=_start_peer, initargs=(tokenizer,)) as pool,
    ):
        for ids in pool.imap(_encode_document, lines, PEERS_CHUNK):
            if ids:
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def _start_peer(tokenizer: Tokenizer) -> None:
    global _peer
    library: Any = tokenizer
    encode = tokenizer.encode
    if tokenizer.kind == "huggingface":
        encode = lambda text: library._tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    elif tokenizer.kind == "sentencepiece":
        encode = library._processor.encode
    _peer = _Peer(encode, tokenizer.eod)


def _encode_document(line: str) -> list[int]:
    ids = list(_peer.encode(json.loads(line)["text"]))
    return [*ids, _peer.eod] if ids else ids


def _processor_s() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _rows(kind: str, megabytes: float, seconds: dict[str, list[tuple[float, float]]]) -> list[list[str]]:
    rows = [
        [
            kind,
            f"{name}, MB/s",
            *(_spread([megabytes / s for s in column], "{:.1f}") for column in zip(*rounds, strict=True)),
        ]
        for name, rounds in seconds.items()
    ]
    theirs, ours = (np.array(rounds) for rounds in seconds.values())
    return [
        *rows,
        [
            kind,
            "speed of ours over Megatron-LM's",
            *(_spread(ratios, "{:.2f}") for ratios in (theirs / ours).T),
        ],
    ]


def _spread(values: Iterable[float], form: str) -> str:
    """Median (min to max)."""
    low, middle, high = np.quantile([*values], [0, 0.5, 1])
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def _versions(workers: int) -> str:
    names = ("tokenizers", "sentencepiece", "megatron-core")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {platform.python_version()}, {versions}; {workers} workers\n"


if __name__ == "__main__":
    sys.exit(main())
