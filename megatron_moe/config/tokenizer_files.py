"""Tokenizer files as far as the number of their ids needs them: read without the libraries that encode."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.config import huggingface_files
from megatron_moe.config.errors import InputError
from megatron_moe.config.model_file import MOST_IDS, read_model

BYTES_VOCAB_SIZE = 257
"""256 byte values and the end of a document."""
TIKTOKEN_EOD = "<|endoftext|>"
"""What ends a document unless data.tokenizer.eod says otherwise."""


def vocab_size(kind: str, model: str | Path, eod: str | None = None) -> int:
    """Ids of a tokenizer: the largest one, added tokens and the end of a document included, plus 1.

    InputError, naming the file, if it is missing or no such tokenizer.
    """
    if kind == "sentencepiece":
        return int(sentencepiece_model(model)[1].vocab_size())
    if kind == "huggingface":
        return huggingface_files.vocab_size(model)
    ranks = read_ranks(model)
    return max(*ranks.values(), eod_rank(ranks, eod)) + 1


def sentencepiece_model(path: str | Path) -> tuple[bytes, Any]:
    """A sentencepiece model, as bytes and as the processor that has loaded it. InputError if it is none."""
    content = read_model(path, "the sentencepiece model")
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        # An empty file parses as a model without pieces, which later calls only complain about on stderr.
        if content and processor.LoadFromSerializedProto(content):
            return content, processor
    except RuntimeError:
        pass
    raise InputError(f"{path}: not a sentencepiece model, or a damaged one ({len(content):,} bytes)")


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Ranks in tiktoken's form: a line for each token, its bytes in base64 and its id.

    InputError, with the line, for anything else, for an id given twice, and if one of the 256 bytes is
    missing, without which some text has no ids.
    """
    ranks: dict[bytes, int] = {}
    owners: dict[int, int] = {}
    for number, line in enumerate(read_model(path, "tiktoken's ranks").splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank_text = line.split()
            token, rank = base64.b64decode(text, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{path}:{number}: not ranks in tiktoken's form, a token in base64 and its id a line: "
                f"{line[:40].decode(errors='replace')}"
            ) from None
        if not 0 <= rank < MOST_IDS or not token or token in ranks or rank in owners:
            other = "a token twice" if token in ranks else f"an id twice, or one that cannot be: {rank}"
            raise InputError(f"{path}:{number}: holds {other if token else 'a token without bytes'}")
        ranks[token] = owners[rank] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(
            f"{path}: has no id for {len(missing)} of the 256 bytes, first for 0x{missing[0]:02x}, so that "
            "it cannot spell every text"
        )
    return ranks


def eod_rank(ranks: Mapping[bytes, int], eod: str | None) -> int:
    """The id that ends a document: its own, if it is one of the ranks, or else the first one behind them."""
    return ranks.get((eod or TIKTOKEN_EOD).encode(), max(ranks.values()) + 1)
