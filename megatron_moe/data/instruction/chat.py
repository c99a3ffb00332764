"""Conversations as token ids, and which of these an assistant has written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_moe.data.documents import BadRecord
from megatron_moe.data.huggingface import HuggingFaceTokenizer
from megatron_moe.data.instruction.chat_template import ChatTemplate, Span, find_template
from megatron_moe.data.instruction.messages import ASSISTANT, Message
from megatron_moe.data.tokenizers import Tokenizer, as_array

_MARK_IT = "mark answers in a copy of it by {% generation %} and name that in data.instruction.chat_template"

Answers = Literal["all", "last"]
Ids = NDArray[np.uint32]
Marks = NDArray[np.bool_]


class Chat(Protocol):
    """How conversations become token ids."""

    form: str
    """What is said of it."""
    sha256: str
    """Of all that decides what a conversation becomes, the tokenizer apart."""

    def encode(self, messages: Sequence[Message], answers: Answers) -> tuple[Ids, Marks]:
        """[t] the ids of a whole conversation, and which of them are answers with the ends of their turns.
        BadRecord where that cannot be said."""

    def prompt(self, messages: Sequence[Message]) -> Ids:
        """[t] the ids up to where the assistant would go on."""


def open_chat(
    tokenizer: Tokenizer, tokenizer_file: str | Path | None, template: str | Path | None = None
) -> Chat:
    """The chat form of a tokenizer: its own template, or the one in the file `template`, or else the plain
    form.

    Args:
        tokenizer_file: where the tokenizer lies, if it is a file.

    InputError for what is no template.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer_file is not None:
        found = find_template(tokenizer_file, template)
        if found is not None:
            return TemplateChat(tokenizer, found)
    return PlainChat(tokenizer)


class PlainChat:
    """A form for tokenizers without a template: `### User:`, a line break, the text and an empty line, for
    each message by its role; an answer ends with the end of document instead."""

    form = "the plain form (### User: ... ### Assistant: ...)"
    sha256 = hashlib.sha256(b"megatron_moe: ### Role:, text, empty line; answers end with eod").hexdigest()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, messages: Sequence[Message], answers: Answers) -> tuple[Ids, Marks]:
        last = max(at for at, message in enumerate(messages) if message["role"] == ASSISTANT)
        ids: list[int] = []
        marks: list[bool] = []
        for at, message in enumerate(messages):
            for part, is_answer in self._parts(message):
                learned = is_answer and (answers == "all" or at == last)
                ids += part
                marks += [learned] * len(part)
        return as_array(ids), np.array(marks, np.bool_)

    def prompt(self, messages: Sequence[Message]) -> Ids:
        parts = [ids for message in messages for ids, _ in self._parts(message)]
        return as_array([token for part in [*parts, self._head(ASSISTANT)] for token in part])

    def _parts(self, message: Message) -> list[tuple[list[int], bool]]:
        head, encode = self._head(message["role"]), self._tokenizer.encode
        if message["role"] == ASSISTANT:
            return [(head, False), ([*encode(message["content"]), self._tokenizer.eod], True)]
        return [(head, False), (encode(message["content"]), False), (encode("\n\n"), False)]

    def _head(self, role: str) -> list[int]:
        return self._tokenizer.encode(f"### {role.capitalize()}:\n")


class TemplateChat:
    """The chat template of a Hugging Face tokenizer: ids as transformers' apply_chat_template gives them."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        self.form = f"the chat template in {template.source}"
        self.sha256 = template.sha256

    def encode(self, messages: Sequence[Message], answers: Answers) -> tuple[Ids, Marks]:
        marked = self._template.marks_answers
        text, spans = (_marked_spans if marked else _spans_by_prefixes)(self._template, messages, answers)
        ids, places = self._tokenizer.encode_with_places(text)
        special = np.isin(ids, list(self._tokenizer.special))
        marks = np.zeros(len(ids), np.bool_)
        for begin, end in spans:
            # By the ends of tokens: blanks before a word may be left out of its place.
            inside = np.flatnonzero((places[:, 1] > begin) & ((places[:, 0] < end) | (places[:, 1] <= end)))
            if not inside.size:
                continue
            behind = _behind_turn(text, end, special, places, inside)
            # What is marked may be the text alone, without the end of its turn.
            if marked and not special[behind - 1] and behind < len(ids) and special[behind]:
                behind += 1
            marks[inside[0] : behind] = True
        return ids, marks

    def prompt(self, messages: Sequence[Message]) -> Ids:
        return as_array(self._tokenizer.encode(self._template.render(messages, add_generation_prompt=True)))


def _behind_turn(
    text: str, end: int, special: Marks, places: NDArray[np.int64], inside: NDArray[np.int64]
) -> int:
    """The token behind the end of an answer's turn: behind the last special token of a span, if only blanks
    follow it there, else behind the span.

    Args:
        text: of the conversation, in which the span ends with character `end`.
        special, places: of all tokens.
        inside: numbers of the tokens of the span.
    """
    ends = inside[special[inside]]
    if ends.size and not text[places[ends[-1], 1] : end].strip():
        return int(ends[-1]) + 1
    return int(inside[-1]) + 1


def _marked_spans(
    template: ChatTemplate, messages: Sequence[Message], answers: Answers
) -> tuple[str, list[Span]]:
    """The text, and what of it the template itself calls an answer."""
    text, spans = template.render_marked(messages)
    written = sum(message["role"] == ASSISTANT for message in messages)
    if answers == "last" and len(spans) != written:
        raise BadRecord(
            f"the chat template marks {len(spans)} answers of {written}, so that the last one is not known; "
            "set data.instruction.answers to all"
        )
    return text, spans if answers == "all" else spans[-1:]


def _spans_by_prefixes(
    template: ChatTemplate, messages: Sequence[Message], answers: Answers
) -> tuple[str, list[Span]]:
    """The text, and the answers in it: what a conversation that ends with an answer has beyond the one
    without it, with which an assistant is asked to go on."""
    turns = [at for at, message in enumerate(messages) if message["role"] == ASSISTANT]
    text = template.render(messages)
    spans = []
    for at in turns if answers == "all" else turns[-1:]:
        through = text if at == len(messages) - 1 else template.render(messages[: at + 1])
        before = template.render(messages[:at], add_generation_prompt=True)
        if not through.startswith(before):
            raise BadRecord(
                "the chat template writes something else before an answer than where it asks for one, so "
                f"that the answer cannot be told from the prompt; {_MARK_IT}"
            )
        if not text.startswith(through):
            raise BadRecord(
                "the chat template writes an answer in another way once messages follow it, so that it "
                f"cannot be found; set data.instruction.answers to last, or {_MARK_IT}"
            )
        spans.append((len(before), len(through)))
    return text, spans
