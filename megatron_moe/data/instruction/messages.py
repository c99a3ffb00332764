"""A record as the messages of a conversation, whatever form it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_moe.config.schema import Instruction
from megatron_moe.data.documents import BadRecord, check_unicode

Message = dict[str, Any]
"""`role` and `content`, both texts, and whatever else a template may know."""

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_OTHER_NAMES = {"human": "user", "gpt": ASSISTANT}
"""Roles as ShareGPT calls them."""

_CONVERSATIONS = ("messages", "conversations")
_PAIRS = (
    ("question", None, "answer"),
    ("instruction", "input", "output"),
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
)
"""Keys of prompt, input and answer: as in GSM8K, Alpaca, and others."""
KNOWN_KEYS = {*_CONVERSATIONS, *(key for pair in _PAIRS for key in pair if key is not None)}
"""What is read of a record where no key of data.instruction names something else."""

_EXAMPLE = "messages, or question and answer, or instruction and output, or prompt and response"


def messages_of(record: Mapping[str, Any], section: Instruction) -> list[Message]:
    """The messages of a record, at least one of which is an answer.

    BadRecord, in words, for a record without a conversation, an answer, a known role or a text.
    """
    if section.prompt_key is not None and section.answer_key is not None:
        messages = _pair(record, section.prompt_key, section.input_key, section.answer_key)
    else:
        messages = _found(record, section.messages_key)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise BadRecord("the conversation has no answer (no message with the role assistant)")
    return messages


def _found(record: Mapping[str, Any], messages_key: str | None) -> list[Message]:
    """A conversation under the key, or what there is of the known forms: exactly one."""
    if messages_key is not None:
        return _conversation(record, messages_key)
    conversations = [key for key in _CONVERSATIONS if record.get(key) is not None]
    pairs = [pair for pair in _PAIRS if all(record.get(key) is not None for key in (pair[0], pair[2]))]
    if len(conversations) + len(pairs) != 1:
        found = "several of" if conversations or pairs else "none of"
        keys = ", ".join(record) or "none"
        raise BadRecord(
            f"has {found} {_EXAMPLE} (its keys: {keys[:200]}); set data.instruction.messages_key, or "
            "prompt_key and answer_key"
        )
    return _pair(record, *pairs[0]) if pairs else _conversation(record, conversations[0])


def _pair(
    record: Mapping[str, Any], prompt_key: str, input_key: str | None, answer_key: str
) -> list[Message]:
    prompt, answer = (_text(record, key) for key in (prompt_key, answer_key))
    if input_key is not None and record.get(input_key) and (given := _text(record, input_key)).strip():
        prompt = f"{prompt}\n\n{given}"
    for key, text in ((prompt_key, prompt), (answer_key, answer)):
        if not text.strip():
            raise BadRecord(f"the text under '{key}' is empty")
    return [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": answer}]


def _text(record: Mapping[str, Any], key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        found = f"is {_shown(text)}, not a text" if key in record else "is missing"
        keys = ", ".join(record) or "none"
        raise BadRecord(f"the key '{key}' {found}; keys of this record: {keys[:200]}")
    check_unicode(text)
    return text


def _conversation(record: Mapping[str, Any], key: str) -> list[Message]:
    given = record.get(key)
    if not isinstance(given, list) or not given:
        found = f"is {_shown(given)}, not a list of messages" if key in record else "is missing"
        raise BadRecord(f"the key '{key}' {found}; keys of this record: {', '.join(record)[:200] or 'none'}")
    return [_message(message, f"message {number}") for number, message in enumerate(given, 1)]


def _message(given: Any, which: str) -> Message:
    if not isinstance(given, Mapping):
        raise BadRecord(f"{which} is {_shown(given)}, not an object with role and content")
    # Rows of parquet have all keys that any row has.
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    role, content = message.get("role"), message.get("content")
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRecord(f"{which} has the role {_shown(role)}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRecord(f"{which} ({role}) has the content {_shown(content)}, not a text")
    if role in ("user", ASSISTANT) and not content.strip():
        raise BadRecord(f"{which} ({role}) is empty")
    check_unicode(content)
    return {**message, "role": role, "content": content}


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
