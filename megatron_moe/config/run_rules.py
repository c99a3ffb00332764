"""Rules about data, schedule, and what is installed."""

from __future__ import annotations

import importlib.metadata
import re

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment

MEGATRON_CORE_VERSIONS = ((0, 16, 1), (0, 20, 0))
"""The first version that is supported, and the first one that is not."""


def megatron_core_supported(e: Experiment) -> Problems:
    """The engine leans on internals of Megatron-Core that were looked at in these versions only."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    first, beyond = MEGATRON_CORE_VERSIONS
    if found is None or not first <= tuple(int(part or 0) for part in found.groups()) < beyond:
        text = f"cannot be trained with megatron-core {version}, the installed version"
        yield Problem(("model",), text, "pip install 'megatron-core>=0.16.1,<0.20'")


def data_said_once(e: Experiment) -> Problems:
    """Token files are either given or made; mock data has none."""
    d = e.data
    if d.kind == "mock":
        for key, value in (("data.path", d.path), ("data.prepare.input", d.prepare and d.prepare.input)):
            if value is not None:
                yield Problem(
                    (key, "data.kind"),
                    "is not read under data.kind",
                    f"set {key.removesuffix('.input')} to null, or data.kind to pretraining",
                )
    elif d.path is None and d.prepare is None:
        yield Problem(
            ("data.path", "data.prepare"), "is not set, and neither is data.prepare", "set one of the two"
        )
    elif d.path is not None and d.prepare is not None:
        yield Problem(
            ("data.path", "data.prepare.input"), "and data.prepare.input are both set", "keep one of the two"
        )


def tokenizer_said_once(e: Experiment) -> Problems:
    """A tokenizer is bytes, a file, or trained on the text that is prepared."""
    t, model, size = e.data.tokenizer, "data.tokenizer.model", "data.tokenizer.vocab_size"
    if t.kind == "bytes":
        for key, value in ((model, t.model), (size, t.vocab_size)):
            if value is not None:
                yield Problem(
                    (key, "data.tokenizer.kind"), "is not used with data.tokenizer.kind", "set it to null"
                )
    elif t.model is not None and t.vocab_size is not None:
        yield Problem(
            (model, size),
            f"is a tokenizer with a size of its own, so that {size} has no effect",
            "keep one of the two",
        )
    elif e.data.kind == "pretraining" and t.model is None:
        if e.data.prepare is None:
            text = "is not set, and there is no data.prepare to train one on"
            yield Problem((model, "data.prepare"), text, "set it, or data.tokenizer.kind to bytes")
        elif t.vocab_size is None:
            text = f"is not set, and neither is {model}"
            yield Problem((size, model), text, "set the size of the tokenizer to train, for example 2048")


def split_has_training_part(e: Experiment) -> Problems:
    """Something is left to train on."""
    if e.data.split[0] == 0:
        yield Problem(
            ("data.split",),
            "leaves nothing to train on",
            "make the first entry positive, for example [95, 5]",
        )


def evaluation_has_data(e: Experiment) -> Problems:
    """What is evaluated on is held out."""
    if e.training.eval_interval is not None and e.data.split[1] == 0 and e.data.kind != "mock":
        keys = ("training.eval_interval", "data.split")
        yield Problem(
            keys,
            "needs a validation part, and data.split has none",
            "set data.split to [95, 5], or leave it out",
        )
