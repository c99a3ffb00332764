"""What a worker process of `data.preprocess` does: a chunk of a file in, its tokens out. Light: no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.data.documents import Chunk, texts
from megatron_moe.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """All that turns a chunk into tokens; travels to the workers once."""

    tokenizer: Tokenizer
    dtype: type[np.integer[Any]]
    json_key: str
    append_eod: bool


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


def encode_chunk(encoder: Encoder, chunk: Chunk) -> Encoded:
    """Tokenize the documents of a chunk. InputError, with file and line, for what cannot be read."""
    parts: list[NDArray[Any]] = []
    empty = text_bytes = 0
    for text in texts(chunk, encoder.json_key):
        ids = encoder.tokenizer.encode(text)
        if not ids:
            empty += 1
            continue
        if encoder.append_eod and chunk.ends_document:
            ids.append(encoder.tokenizer.eod)
        parts.append(np.array(ids, dtype=encoder.dtype))
        text_bytes += len(text.encode())
    tokens = np.concatenate(parts) if parts else np.zeros(0, encoder.dtype)
    lengths = np.array([part.size for part in parts], dtype=np.int64)
    return Encoded(tokens, lengths, empty, text_bytes, chunk.ends_document)


_encoder: Encoder


def start_worker(encoder: Encoder) -> None:
    """Set up a worker process: it keeps the encoder, leaves Ctrl-C to its parent, and never outlives it."""
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def encode_in_worker(chunk: Chunk) -> Encoded:
    """`encode_chunk` with the encoder of this process."""
    return encode_chunk(_encoder, chunk)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
