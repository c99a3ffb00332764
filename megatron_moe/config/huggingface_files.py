"""A Hugging Face tokenizer.json and the files beside it, as far as they can be read without the library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.model_file import MOST_IDS, read_model


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
        tokenizer = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a tokenizer.json: {error}") from None
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise InputError(f"{file}: not a tokenizer.json: it has no section model")
    return content, tokenizer


def vocab_size(path: str | Path) -> int:
    """The largest id, added tokens included, plus 1. InputError if there is none."""
    _, description = read_tokenizer_json(path)
    return max(_vocabulary(tokenizer_json(path), description).values()) + 1


def end_of_document(path: str | Path, eod: str | None) -> str:
    """The token that ends a document: `eod`, or else what the files beside the tokenizer.json call the end of
    text.

    InputError, beginning with "eod: ", if none does, or if there is no such token.
    """
    file = tokenizer_json(path)
    _, description = read_tokenizer_json(path)
    vocabulary = _vocabulary(file, description)
    name = eod if eod is not None else _end_of_text(file, vocabulary)
    if name is None:
        raise InputError(
            f"eod: needed, as nothing beside {file} names its end of text; {_candidates(description)}"
        )
    if name not in vocabulary:
        source = "" if eod else ", which a file beside it calls the end of text"
        raise InputError(f"eod: {file} has no token '{name}'{source}; {_candidates(description)}")
    return name


def _vocabulary(file: Path, description: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id. InputError if there is none, or if an id is no number or beyond MOST_IDS."""
    vocab, added = description["model"].get("vocab"), description.get("added_tokens") or []
    try:
        # Unigram models have a list of pieces with their scores, the others a mapping.
        tokens = {piece[0]: at for at, piece in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        tokens |= {token["content"]: int(token["id"]) for token in added}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        tokens = {}
    if not tokens:
        raise InputError(f"{file}: not a tokenizer.json: it has no vocabulary")
    for token, number in tokens.items():
        if not isinstance(number, int) or not 0 <= number < MOST_IDS:
            raise InputError(
                f"{file}: not a tokenizer.json: the id of '{token}' is {str(number)[:40]}; ids are numbers "
                f"below {MOST_IDS:,}"
            )
    return tokens


def _end_of_text(file: Path, vocabulary: Mapping[str, int]) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json_beside(file, name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    ids = read_json_beside(file, "generation_config.json").get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    return next((token for token, number in vocabulary.items() if number == first), None)


def read_json_beside(tokenizer: Path, name: str) -> dict[str, Any]:
    """The object in the file `name` beside a tokenizer.json; empty where there is none. InputError for what
    is no JSON."""
    file = tokenizer.with_name(name)
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}


def _candidates(description: Mapping[str, Any]) -> str:
    """What the user could name as end of a document."""
    special = [token["content"] for token in description.get("added_tokens") or [] if token.get("special")]
    likely = [token for token in special if re.search(r"end|eos|/s|sep", token, re.IGNORECASE)]
    if shown := (likely or special)[:5]:
        return f"special tokens that it has: {', '.join(shown)}"
    return "it has no special tokens; name another one of its tokens"
