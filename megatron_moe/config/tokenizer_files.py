"""Tokenizer files as far as the number of their ids needs them: read without the libraries that encode."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError

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
        return _huggingface_size(model)
    ranks = read_ranks(model)
    return max(*ranks.values(), eod_rank(ranks, eod)) + 1


def read_model(path: str | Path, what: str) -> bytes:
    """The bytes of a tokenizer's file. InputError if it cannot be read; `what`: such as "the sentencepiece
    model"."""
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name the file of {what} in it{_likely(path)}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read {what}: {error.strerror}") from None


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


def tokenizer_json(path: str | Path) -> Path:
    """The tokenizer.json that a path names, by itself or by its folder. InputError for a folder without
    one."""
    file = Path(path)
    if not file.is_dir():
        return file
    if not (file / "tokenizer.json").is_file():
        raise InputError(f"{file}: there is no tokenizer.json in this folder")
    return file / "tokenizer.json"


def read_tokenizer_json(path: str | Path) -> tuple[bytes, dict[str, Any]]:
    """A Hugging Face tokenizer.json, as bytes and parsed. InputError if it is none."""
    file = tokenizer_json(path)
    content = read_model(file, "the tokenizer.json")
    try:
        tokenizer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a tokenizer.json: {error}") from None
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise InputError(f"{file}: not a tokenizer.json: it has no section model")
    return content, tokenizer


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
        if rank < 0 or not token or token in ranks or rank in owners:
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


def _huggingface_size(path: str | Path) -> int:
    _, tokenizer = read_tokenizer_json(path)
    vocab, added = tokenizer["model"].get("vocab"), tokenizer.get("added_tokens") or []
    try:
        # Unigram models have a list of pieces, the others a mapping.
        largest = len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values(), default=-1)
        size = int(max([largest, *(token["id"] for token in added)])) + 1
    except (AttributeError, KeyError, TypeError, ValueError):
        size = 0
    if size <= 0:
        raise InputError(f"{tokenizer_json(path)}: not a tokenizer.json: it has no vocabulary")
    return size


def _likely(folder: str | Path) -> str:
    """A file of the folder that the user probably means."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".model", ".tiktoken"))
    return f", for example {files[0]}" if files else ""
