"""Chat templates against transformers, and which tokens are answers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_cases import (
    CONVERSATIONS,
    MARKED,
    MISTRAL,
    ONE,
    QWEN,
    SMOLLM2,
    TEMPLATES,
    THINKING,
    TWO,
    tokenizer_folder,
    turn,
)

from megatron_moe.config.errors import InputError
from megatron_moe.data.documents import BadRecord
from megatron_moe.data.instruction import chat_template
from megatron_moe.data.instruction.chat import Chat, open_chat
from megatron_moe.data.instruction.chat_template import ChatTemplate
from megatron_moe.data.tokenizers import BytesTokenizer, load_tokenizer


def opened(folder: Path, template: Path | None = None) -> Chat:
    return open_chat(load_tokenizer("huggingface", folder), folder, template)


def theirs(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(("template", "end"), TEMPLATES.values(), ids=TEMPLATES)
def test_ids_are_those_of_transformers_and_answers_are_targets(
    tmp_path: Path, template: str, end: str, messages: list[dict[str, Any]]
) -> None:
    folder = tokenizer_folder(tmp_path, template)
    chat, reference = pickle.loads(pickle.dumps(opened(folder))), theirs(folder)
    ids, answers = chat.encode(messages, "all")
    assert ids.tolist() == reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    asked = reference.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert chat.prompt(messages[:-1]).tolist() == asked
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    if "| trim" in template:
        contents = [content.strip() for content in contents]
    said = [reference.decode(part.tolist()) for part in runs(ids, answers)]
    blank = " " if template == MISTRAL else ""  # which it puts before each answer
    assert said == [blank + content + end for content in contents]
    _, last = chat.encode(messages, "last")
    assert [reference.decode(part.tolist()) for part in runs(ids, last)] == said[-1:]


def runs(ids: Any, marks: Any) -> list[Any]:
    """The stretches of ids that are marked."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(int)))
    return [ids[begin:end] for begin, end in borders.reshape(-1, 2)]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_what_a_template_marks_are_the_answers_of_transformers(tmp_path: Path, trim_offsets: bool) -> None:
    folder = tokenizer_folder(tmp_path, MARKED, trim_offsets)
    expected = theirs(folder).apply_chat_template(
        TWO[:-1] + ONE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, answers = opened(folder).encode(TWO[:-1] + ONE, "all")
    assert ids.tolist() == expected["input_ids"]
    assert answers.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_blanks_at_both_ends_of_an_answer_belong_to_it(tmp_path: Path, trim_offsets: bool) -> None:
    folder = tokenizer_folder(tmp_path, SMOLLM2, trim_offsets)
    tokenizer = load_tokenizer("huggingface", folder)
    ids, answers = opened(folder).encode([ONE[0], turn("assistant", "\n\n  4 \n")], "all")
    assert tokenizer.decode(ids[answers].tolist()) == "\n\n  4 \n<|im_end|>"


def test_a_tag_renders_as_in_transformers(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% set made = dict(role=message.role) %}{% set ns = namespace(n=loop.index) %}\n"
        "    {% if ns.n %}\n  {{ made | tojson }} {{ {'b': '<\u00e9>', 'a': 1} | tojson(indent=2) }}\n"
        "{% endif %}"
        "{{ strftime_now('%Y') }}{{ missing }}{{ eos_token }}{% endfor %}"
    )
    folder = tokenizer_folder(tmp_path, template)
    expected = theirs(folder).apply_chat_template(TWO, tokenize=False)
    assert ChatTemplate("x", template, {"eos_token": "</s>"}).render(TWO) == expected


ESCAPES = {
    "attributes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "a list that is changed": "{% set _ = messages.append(1) %}",
    "a namespace": "{% set ns = namespace(__class__=1) %}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    with pytest.raises(BadRecord, match="refuses it"):
        ChatTemplate("x.jinja", template, {}).render(ONE)


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(BadRecord, match=r"refuses it: it computes for more than 0\.1 s"):
        ChatTemplate("x.jinja", loops, {}).render(ONE)


def test_what_cannot_be_told_apart_is_refused_in_words(tmp_path: Path) -> None:
    chat = opened(tokenizer_folder(tmp_path / "thinking", THINKING))
    with pytest.raises(BadRecord, match=r"in another way once messages follow it.*answers to last"):
        chat.encode(TWO, "all")
    ids, answers = chat.encode(TWO, "last")
    assert int(answers.sum()) < len(ids)
    prompted = SMOLLM2.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\nHm: ' }}")
    with pytest.raises(BadRecord, match=r"something else before an answer.*\{% generation %\}"):
        opened(tokenizer_folder(tmp_path / "prompted", prompted)).encode(ONE, "all")
    with pytest.raises(BadRecord, match="refuses it: roles must alternate"):
        opened(tokenizer_folder(tmp_path / "roles", MISTRAL)).encode(ONE[1:] + ONE, "all")


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ 'own ' + messages[0].content }}")
    folder = tokenizer_folder(tmp_path / "tokenizer", SMOLLM2)
    hashes = {opened(folder).sha256, opened(folder, own).sha256}
    assert opened(folder, own).prompt(ONE).tolist() == load_tokenizer("huggingface", folder).encode(
        "own What is 2 + 2?"
    )
    (folder / "chat_template.jinja").write_text(QWEN)  # stands before what the configuration has
    hashes.add(opened(folder).sha256)
    assert len(hashes) == 3
    assert "plain form" in opened(tokenizer_folder(tmp_path / "without", None)).form
    own.write_text("{% if %}")
    with pytest.raises(InputError, match=r"own\.jinja: no jinja template: line 1"):
        opened(folder, own)


def test_the_plain_form_ends_answers_with_the_end_of_document() -> None:
    chat = open_chat(BytesTokenizer(), None)
    ids, answers = chat.encode(TWO, "all")
    text = "".join(chr(token) if token < 128 else "?" for token in ids.tolist() if token < 256)
    assert text.startswith(
        "### System:\nBe short.\n\n### User:\nWhere  does\nthe sun rise?\n\n### Assistant:\n"
    )
    said = [bytes(part[:-1].tolist()).decode() for part in runs(ids, answers)]
    assert said == [TWO[2]["content"], TWO[4]["content"]]
    assert [part[-1] for part in runs(ids, answers)] == [256, 256]
    assert bytes(chat.prompt(ONE[:1]).tolist()) == b"### User:\nWhat is 2 + 2?\n\n### Assistant:\n"
    assert len(runs(ids, chat.encode(TWO, "last")[1])) == 1
