"""What a worker process of `data.preprocess` does: a chunk of a file in, its tokens out. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.data.documents import BadRecords, Chunk, stop, texts
from megatron_moe.data.tokenizers import Tokenizer

FIRST_NAMED = 3
"""So many bad records of all are named."""


@dataclass(frozen=True)
class Encoder:
    """All that turns a chunk into tokens; travels to the workers once."""

    tokenizer: Tokenizer
    dtype: type[np.integer[Any]]
    json_key: str
    append_eod: bool
    bad_records: BadRecords


@dataclass(frozen=True)
class Encoded:
    """The documents of one chunk."""

    tokens: NDArray[Any]
    """[t] ids of all documents, one after the other."""
    lengths: NDArray[np.int64]
    """Tokens of each document that has any."""
    empty_documents: int
    """Documents without a token, which are left out."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    ends_document: bool
    """False: the last document goes on in the next chunk."""
    bad_records: int = 0
    """Records that could not be read and were left out."""
    first_bad: tuple[str, ...] = ()
    """What is wrong with the first ones, and where they are."""


def encode_chunk(encoder: Encoder, chunk: Chunk) -> Encoded:
    """Tokenize the documents of a chunk. InputError, with file and line, for what cannot be read, unless such
    records are skipped."""
    bad: list[str] = []
    complain = stop if encoder.bad_records == "error" else bad.append
    documents = list(texts(chunk, encoder.json_key, complain))
    try:
        ids = encoder.tokenizer.encode_many(documents)
    except InputError as error:
        raise InputError(f"{chunk.path}: from line or row {chunk.first} on: {error}") from None
    end = int(encoder.append_eod and chunk.ends_document)
    lengths = np.array([found.size + end for found in ids if found.size], np.int64)
    tokens = np.empty(int(lengths.sum()), encoder.dtype)
    begin = 0
    for found in ids:
        if found.size:
            tokens[begin : begin + found.size] = found
            tokens[begin + found.size : begin + found.size + end] = encoder.tokenizer.eod
            begin += found.size + end
    return Encoded(
        tokens,
        lengths,
        empty_documents=len(ids) - lengths.size,
        text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in documents),
        ends_document=chunk.ends_document,
        bad_records=len(bad),
        first_bad=tuple(bad[:FIRST_NAMED]),
    )
