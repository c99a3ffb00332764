"""Cases of `test_rules` for the tokenizer's keys."""

from __future__ import annotations

from experiment_files import DENSE

_PREPARED = DENSE.replace("data: {kind: mock, tokenizer: {kind: bytes}}", "data: {prepare: {input: [x.txt]}}")
_T = "data.tokenizer"

TOKENIZER_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "tokenizer_keys_of_kind",
        DENSE,
        [f"{_T}.vocab_size=9"],
        [f"{_T}.vocab_size=null"],
        f"{_T}.vocab_size",
        f"is not used with {_T}.kind",
    ),
    (
        "tokenizer_keys_of_kind",
        DENSE,
        [f"{_T}.eod=<eos>"],
        [f"{_T}.eod=null"],
        f"{_T}.eod",
        f"is not used with {_T}.kind",
    ),
    (
        "tokenizer_keys_of_kind",
        _PREPARED,
        [f"{_T}.vocab_size=300", f"{_T}.pattern=gpt2"],
        [f"{_T}.pattern=null"],
        f"{_T}.pattern",
        f"is not used with {_T}.kind",
    ),
    (
        "tokenizer_keys_of_kind",
        _PREPARED,
        ["model.vocab_size=9", f"{_T}={{kind: huggingface, model: /x/tokenizer.json, vocab_size: 9}}"],
        [f"{_T}.vocab_size=null"],
        f"{_T}.vocab_size",
        f"is not used with {_T}.kind",
    ),
    (
        "tokenizer_said_once",
        _PREPARED,
        ["model.vocab_size=9", f"{_T}.kind=huggingface"],
        [f"{_T}.model=my/tokenizer.json"],
        f"{_T}.model",
        "set it, for example to my/tokenizer.json",
    ),
    (
        "tokenizer_said_once",
        DENSE,
        ["model.vocab_size=9", f"{_T}.kind=tiktoken"],
        [f"{_T}.model=my.tiktoken"],
        f"{_T}.model",
        "set it, for example to my.tiktoken",
    ),
    (
        "tokenizer_said_once",
        _PREPARED,
        [f"{_T}.vocab_size=300", f"{_T}.eod=</s>"],
        [f"{_T}.eod=null"],
        f"{_T}.eod",
        "has an end of its own",
    ),
]
