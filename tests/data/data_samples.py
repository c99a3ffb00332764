"""Small inputs that the tests of the data room share."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.schema import Data, Experiment, Model, Training
from megatron_moe.data.tokenizers import BytesTokenizer

SHAKESPEARE = Path(__file__).parents[2] / "corpus" / "tinyshakespeare.txt"

ODD_TEXTS = [
    "plain",
    "  spaces   inside and at the end  ",
    "\ttabs\t\there\n\n\n\nand several newlines\n\n",
    "",
    "Grüße, 日本語, 🙂 👩‍👩‍👧, e\u0301",
    "carriage\r\nreturn, form\x0cfeed, line\u2028separator, nul\x00",
    "</s><unk><pad><0x0A> \u2047 \u2581 sentencepiece's own",
    "\ufeffbyte order mark",
]


def write_text(path: Path, text: str) -> str:
    """Write a text file, gzipped if its name says so."""
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_jsonl(path: Path, texts: Iterable[str], key: str = "text") -> str:
    return write_text(path, "".join(json.dumps({"id": 7, key: text}) + "\n" for text in texts))


def experiment(
    data: Data, *, vocab_size: int | None = None, seq_length: int = 16, seed: int = 1234, **training: Any
) -> Experiment:
    """A filled experiment around `data`."""
    model = Model(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=vocab_size)
    sizes = {"train_iters": 3, "global_batch_size": 4, **training}
    return Experiment(
        name="test", model=model, data=data, training=Training(seq_length=seq_length, seed=seed, **sizes)
    )


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden files included."""
    return {entry.name for entry in folder.iterdir()}


class DyingTokenizer(BytesTokenizer):
    """Takes its process down, as the kernel does with one that wants too much memory."""

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint8]]:
        os._exit(9)
