"""Rules about the tokenizer, and what is installed."""

from __future__ import annotations

import importlib.metadata
import re

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment
from megatron_moe.config.sources import texts_of

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
        files = [f"data.blend.{name}.path" for name, source in (e.data.blend or {}).items() if source.path]
        if files:
            text = f"is not set, but {files[0]} names token files, which were made with some tokenizer"
            yield Problem((model, files[0]), text, "set it to that one, or data.tokenizer.kind to bytes")
        elif not texts_of(e.data):
            text = "is not set, and there is no data.prepare to train one on"
            yield Problem((model, "data.prepare"), text, "set it, or data.tokenizer.kind to bytes")
        elif t.vocab_size is None:
            text = f"is not set, and neither is {model}"
            yield Problem((size, model), text, "set the size of the tokenizer to train, for example 2048")
