"""Train a sentencepiece tokenizer on the corpus."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_moe.config.errors import InputError, not_written
from megatron_moe.config.model_file import MOST_IDS
from megatron_moe.data.documents import BadRecords, stop, texts
from megatron_moe.data.inputs import open_input
from megatron_moe.data.staging import staging, sync_folder

TRAINING_BYTES = 256 << 20
"""At most so much text is learned from, an equal share of each input from its beginning: the trainer holds it
in memory."""

_LONGEST_SENTENCE = 1000
"""Characters. Sentencepiece leaves out sentences of more than 4192 bytes, and a character has up to 4."""
_RESERVED = re.compile("[\\n\\r\\t\\0\u2047\u2581]")
"""Sentencepiece leaves out sentences that hold one of the control characters; none of these should become
part of a piece."""

_SPECIAL_IDS = 3


@dataclass(frozen=True)
class Corpus:
    """Files to learn from."""

    inputs: Sequence[str]
    json_key: str = "text"
    bad_records: BadRecords = "error"


def train_sentencepiece(inputs: Sequence[str], vocab_size: int, output: Path, json_key: str = "text") -> None:
    """`train_on` the text of these files."""
    train_on([Corpus(inputs, json_key)], vocab_size, output)


def train_on(corpora: Sequence[Corpus], vocab_size: int, output: Path) -> None:
    """Train a BPE model of exactly `vocab_size` ids on the text of `corpora` and write it to `output`, whole
    or not at all.

    The text is taken as it is, and what has no piece is spelled in bytes: every text comes back from its ids
    unchanged.
    Ids: 0 unknown (never used), 1 end of document, 2 padding, 3-258 bytes, then pieces. The same input gives
    the same bytes.
    InputError for inputs as `preprocess`, and for a vocabulary that is too large or too small for the text.
    """
    model = _train(_sentences(corpora), vocab_size)
    with staging(output, wait=False) as folder:
        try:
            with (folder / output.name).open("wb") as stream:
                stream.write(model)
                stream.flush()
                os.fsync(stream.fileno())
            (folder / output.name).rename(output)
            sync_folder(output.parent)
        except OSError as error:
            raise not_written(f"{output}: cannot write the tokenizer", error) from None


def _train(sentences: Iterator[str], vocab_size: int) -> bytes:
    import sentencepiece

    if vocab_size > MOST_IDS:  # sentencepiece would not come back for minutes
        raise InputError(f"vocab_size: {vocab_size} ids are more than text gives; for example 32000")
    first = next(sentences, None)
    if first is None:
        raise InputError(
            "no text to train a tokenizer on; give files that hold more than spaces and newlines"
        )

    Console(stderr=True, highlight=False).print(f"training a tokenizer of {vocab_size:,} ids")

    def all_sentences() -> Iterator[str]:
        yield first
        try:
            yield from sentences
        except InputError as error:  # sentencepiece would hand on its text only
            mistakes.append(error)
            raise

    model = io.BytesIO()
    mistakes: list[InputError] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=all_sentences(),
            model_writer=model,
            vocab_size=max(vocab_size, _SPECIAL_IDS),  # below, it would not say how many are needed
            model_type="bpe",
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            pad_id=2,
            bos_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if mistakes:
            raise mistakes[0] from None
        raise _explained(str(error), vocab_size) from None
    return model.getvalue()


def _explained(message: str, vocab_size: int) -> Exception:
    if largest := re.search(r"too high .*value <= (\d+)", message):
        return InputError(
            f"vocab_size: {vocab_size} ids are more than this text gives; "
            f"the largest that works is {largest[1]}"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return InputError(
            f"vocab_size: {vocab_size} ids are too few for the 256 bytes and the characters of this text; "
            f"the smallest that works is {smallest[1]}"
        )
    return RuntimeError(f"sentencepiece could not train a tokenizer: {message}")


def _sentences(corpora: Sequence[Corpus]) -> Iterator[str]:
    share = TRAINING_BYTES // sum(len(corpus.inputs) for corpus in corpora)
    for corpus in corpora:
        for path in corpus.inputs:
            yield from _beginning(path, corpus, share)


def _beginning(path: str, corpus: Corpus, at_most_bytes: int) -> Iterator[str]:
    complain = stop if corpus.bad_records == "error" else _pass_over
    left = at_most_bytes
    with contextlib.closing(open_input(path, corpus.json_key)) as file:
        for chunk in file.chunks("line", "behind newlines"):
            for text in texts(chunk, corpus.json_key, complain):
                yield from _pieces(text)
            left -= len(chunk.payload)
            if left <= 0:
                break


def _pass_over(problem: str) -> None:
    """Whoever makes the token files will tell."""


def _pieces(text: str) -> Iterator[str]:
    for line in _RESERVED.split(text):
        for start in range(0, len(line), _LONGEST_SENTENCE):
            yield line[start : start + _LONGEST_SENTENCE]
