"""Rules about the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Data, Experiment
from megatron_moe.config.sources import texts_of

_KIND, _MODEL, _SIZE = "data.tokenizer.kind", "data.tokenizer.model", "data.tokenizer.vocab_size"
_OF_KIND = {
    "bytes": (),
    "huggingface": ("model", "eod"),
    "tiktoken": ("model", "eod", "pattern"),
    "sentencepiece": ("model", "eod", "vocab_size"),
}
"""The keys of data.tokenizer that each kind uses."""


def tokenizer_keys_of_kind(e: Experiment) -> Problems:
    """A key that the tokenizer does not use says something that would not happen."""
    t = e.data.tokenizer
    for name in ("model", "vocab_size", "eod", "pattern"):
        if getattr(t, name) is not None and name not in _OF_KIND[t.kind]:
            key = f"data.tokenizer.{name}"
            yield Problem((key, _KIND), f"is not used with {_KIND}", "set it to null")


def tokenizer_said_once(e: Experiment) -> Problems:
    """A tokenizer is bytes, a file, or trained on the text that is prepared."""
    t = e.data.tokenizer
    if t.kind == "bytes":
        return
    if t.kind != "sentencepiece":
        if t.model is None:
            example = "my/tokenizer.json" if t.kind == "huggingface" else "my.tiktoken"
            text = f"is not set, and a tokenizer of {_KIND} is always a file"
            yield Problem((_MODEL, _KIND), text, f"set it, for example to {example}")
    elif t.model is not None and t.vocab_size is not None:
        text = f"is a tokenizer with a size of its own, so that {_SIZE} has no effect"
        yield Problem((_MODEL, _SIZE), text, "keep one of the two")
    elif t.model is None:
        if t.eod is not None:
            text = f"has no effect without {_MODEL}: a tokenizer that is trained here has an end of its own"
            yield Problem(("data.tokenizer.eod", _MODEL), text, "set it to null")
        if e.data.kind != "mock":
            yield from _can_be_trained(e.data)


def _can_be_trained(data: Data) -> Iterator[Problem]:
    files = [f"data.blend.{name}.path" for name, source in (data.blend or {}).items() if source.path]
    if files:
        text = f"is not set, but {files[0]} names token files, which were made with some tokenizer"
        yield Problem((_MODEL, files[0]), text, f"set it to that one, or {_KIND} to bytes")
    elif data.kind == "instruction":
        text = "is not set, and records are read with the tokenizer that the model was trained with"
        yield Problem((_MODEL, "data.kind"), text, f"set it, or {_KIND} to bytes")
    elif not texts_of(data):
        text = "is not set, and there is no data.prepare to train one on"
        yield Problem((_MODEL, "data.prepare"), text, f"set it, or {_KIND} to bytes")
    elif data.tokenizer.vocab_size is None:
        text = f"is not set, and neither is {_MODEL}"
        yield Problem((_SIZE, _MODEL), text, "set the size of the tokenizer to train, for example 2048")
