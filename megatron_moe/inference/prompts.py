"""What a model is to continue: from the command line, files, or standard input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.convert.models import Model
from megatron_moe.data.huggingface import HuggingFaceTokenizer
from megatron_moe.data.instruction.chat import open_chat
from megatron_moe.data.tokenizers import Tokenizer, load_tokenizer

_KEYS = ("prompt", "messages", "text", "question")
"""Of a record, the first that is there."""


@dataclass(frozen=True)
class Prompt:
    """One text to be continued, or a conversation to be answered.

    Attributes:
        text: as the user gave it; of a conversation its last message.
        ids: what the model is given.
        is_chat: an answer is asked for.
    """

    text: str
    ids: list[int]
    is_chat: bool


def read_texts(path: Path) -> list[Any]:
    """The prompts of a file: of .jsonl one a record, under `prompt`, `text`, `question` or, as a
    conversation, `messages`; else one a line. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: cannot be read: {reason}") from None
    found = list(_records(path, text)) if path.suffix == ".jsonl" else _lines(text)
    if not found:
        raise InputError(f"{path}: has no prompts; write one a line")
    return found


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _records(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: is no JSON: {error}") from None
        given = [record[key] for key in _KEYS if isinstance(record, dict) and key in record]
        if not given or not isinstance(given[0], str | list):
            raise InputError(f"{path}:{number}: has no prompt; give it one of the keys {', '.join(_KEYS)}")
        yield given[0]


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer that came with a model. Raises InputError where there is none."""
    found = model.tokenizer
    if found is None:
        raise InputError(
            f"{model.folder}: has no tokenizer, which prompts need: put its tokenizer.json or "
            "tokenizer.model into the folder"
        )
    tokenizer = load_tokenizer(found.kind, found.model, found.eod, found.pattern)
    rows = model.experiment.model.vocab_size
    assert rows is not None
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{found.model}: its ids go up to {tokenizer.vocab_size - 1}, and model.vocab_size is {rows}: "
            "this is another model's tokenizer"
        )
    return tokenizer


def encode(
    model: Model, tokenizer: Tokenizer, given: Sequence[Any], as_chat: bool, system: str | None
) -> list[Prompt]:
    """Texts and conversations as the model takes them.

    Args:
        given: texts, and lists of messages, which are always conversations.
        as_chat: texts are what a user says.
        system: what is said to the model before.

    A text gets the tokens that its tokenizer puts around one, such as one for its beginning.
    """
    file = model.tokenizer.model if model.tokenizer is not None else None
    chat = open_chat(tokenizer, file) if as_chat or any(isinstance(it, list) for it in given) else None
    prompts = []
    for number, text in enumerate(given, 1):
        if isinstance(text, str) and not as_chat:
            prompts.append(Prompt(text, _encoded(tokenizer, text), is_chat=False))
            continue
        assert chat is not None
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else _checked(number, text)
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        ids = [int(token) for token in chat.prompt(messages)]
        prompts.append(Prompt(str(messages[-1]["content"]), ids, is_chat=True))
    most = model.experiment.model.max_position_embeddings
    assert most is not None
    if problems := list(_problems(prompts, most)):
        raise InputError(*problems)
    return prompts


def _problems(prompts: Sequence[Prompt], most: int) -> Iterator[str]:
    """Prompts that cannot be continued by a model with so many positions."""
    for number, prompt in enumerate(prompts, 1):
        if not prompt.ids:
            yield f"prompt {number}: is empty; give it some text"
        elif len(prompt.ids) >= most:
            yield (
                f"prompt {number}: has {len(prompt.ids)} tokens, and model.max_position_embeddings is "
                f"{most}: shorten it to at most {most - 1}"
            )


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.encode_whole(text)
    return tokenizer.encode(text)


def _checked(number: int, messages: list[Any]) -> list[dict[str, Any]]:
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"prompt {number}: a message lacks role or content")
    if not messages:
        raise InputError(f"prompt {number}: is a conversation without a message")
    return messages


def ends_of(model: Model, tokenizer: Tokenizer) -> set[int]:
    """Ids at which a text ends: the tokenizer's end of document, and those that generation_config.json and
    config.json name."""
    found = {tokenizer.eod}
    for name in ("generation_config.json", "config.json"):
        path = None if model.huggingface is None else model.huggingface / name
        if path is None or not path.is_file():
            continue
        try:
            ends = json.loads(path.read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        found |= {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}
        if ends is not None:
            break
    return found


def hidden_of(tokenizer: Tokenizer, ends: set[int]) -> set[int]:
    """Ids that stand for no text."""
    return ends | set(getattr(tokenizer, "special", ()))
