"""Streamed text is the text: no half characters, blanks where they belong, nothing behind a stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_moe.inference.text import TextStream

CORPUS = Path(__file__).parents[2] / "corpus" / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece model that falls back to bytes."""
    prefix = tmp_path_factory.mktemp("pieces") / "model"
    text = CORPUS.read_text()[:60_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(prefix),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return SentencePieceTokenizer(f"{prefix}.model")


def parts(
    tokenizer: Tokenizer, prompt: str, text: str, stops: Sequence[str] = ()
) -> tuple[list[str], TextStream]:
    ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer, ids, {tokenizer.eod}, stops)
    # What a model would give after the prompt.
    new = tokenizer.encode(prompt + text)[len(ids) :]
    return [*(stream.add(token) for token in new), stream.end()], stream


def test_characters_of_several_bytes_come_whole() -> None:
    found, stream = parts(BytesTokenizer(), "", "né 漢字 🙂!")
    assert [part for part in found if part] == list("né 漢字 🙂!")
    assert stream.text == "né 漢字 🙂!"


def test_half_a_character_at_the_end_is_told_at_the_end() -> None:
    stream = TextStream(BytesTokenizer(), [], {256}, [])
    assert [stream.add(byte) for byte in "aé".encode()[:2]] == ["a", ""]
    assert stream.end() == "\ufffd"


def test_blanks_stand_where_they_stood(pieces: Tokenizer) -> None:
    found, stream = parts(pieces, "What light through", " yonder window breaks? It is the east, 漢!")
    assert "".join(found) == stream.text == " yonder window breaks? It is the east, 漢!"
    assert all("\ufffd" not in part for part in found)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_any_text_comes_whole(text: str) -> None:
    found, stream = parts(BytesTokenizer(), "prompt: ", text)
    assert "".join(found) == stream.text == text


def test_nothing_of_a_stop_is_ever_shown() -> None:
    found, stream = parts(BytesTokenizer(), "", "one\n\ntwo\n##three", ["\n###", "\n##"])
    assert "".join(found) == stream.text == "one\n\ntwo"
    assert stream.stopped


def test_what_only_looked_like_a_stop_is_shown() -> None:
    found, stream = parts(BytesTokenizer(), "", "one\n#two\n", ["\n##"])
    assert "".join(found) == stream.text == "one\n#two\n"
    assert not stream.stopped


def test_ends_are_no_text() -> None:
    stream = TextStream(BytesTokenizer(), [], {256}, [])
    assert [stream.add(token) for token in (97, 256)] == ["a", ""]
