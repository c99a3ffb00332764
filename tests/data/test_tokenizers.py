"""Tokenizers: every text comes back, training is deterministic, wrong model files are the user's mistake."""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path

import pytest
import sentencepiece
from data_samples import ODD_TEXTS, SHAKESPEARE, write_jsonl, write_text
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.errors import InputError
from megatron_moe.data.tokenizer_training import train_sentencepiece
from megatron_moe.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "shakespeare.model"
    train_sentencepiece([str(SHAKESPEARE)], 1024, path)
    return path


@pytest.fixture(scope="module")
def trained(model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


def foreign_model(path: Path, **options: object) -> Path:
    """A model as other people train them."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SHAKESPEARE.read_text().splitlines()[:2000]),
        model_writer=writer,
        minloglevel=2,
        **{"vocab_size": 400, **options},
    )
    path.write_bytes(writer.getvalue())
    return path


@given(st.text())
def test_bytes_give_every_text_back(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eod]) == text


@given(text=st.text() | st.text(alphabet="a \n\t\u2581<>/s"))
def test_a_trained_model_gives_every_text_back(text: str, trained: SentencePieceTokenizer) -> None:
    ids = trained.encode(text)
    assert trained.decode([*ids, trained.eod]) == text
    assert not {0, trained.eod, 2} & set(ids), "no text has the unknown, end or padding id"


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_come_back(text: str, trained: SentencePieceTokenizer) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_encoding_line_by_line_gives_sentencepieces_own_ids(
    model: Path, trained: SentencePieceTokenizer
) -> None:
    text = SHAKESPEARE.read_text()[:50_000] + "  \n\n \n\ttab\n  "
    assert trained.cuts == "behind newlines"
    assert trained.encode(text) == sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)


def test_the_model_is_what_was_asked_for(model: Path, trained: SentencePieceTokenizer) -> None:
    assert trained.vocab_size == 1024
    assert trained.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    text = SHAKESPEARE.read_text()[:20_000]
    assert len(trained.encode(text)) < 0.5 * len(text), "it has learned pieces of words"


def test_the_same_text_gives_the_same_model_however_it_is_packed(tmp_path: Path) -> None:
    text = SHAKESPEARE.read_text()[:30_000]
    (tmp_path / "other").mkdir()
    inputs = [
        write_text(tmp_path / "a.txt", text),
        write_text(tmp_path / "other" / "b.txt.gz", text),
        write_jsonl(tmp_path / "c.jsonl", text.splitlines(), key="line"),
    ]
    for number, path in enumerate(inputs):
        train_sentencepiece([path], 400, tmp_path / f"{number}.model", json_key="line")
    assert len({(tmp_path / f"{number}.model").read_bytes() for number in range(3)}) == 1


def test_lines_with_tabs_and_very_long_lines_are_learned_from(tmp_path: Path) -> None:
    path = write_text(tmp_path / "code.txt", "\twhile something\n" * 50 + "otherwise " * 2000)
    train_sentencepiece([path], 300, tmp_path / "code.model")
    tokenizer = SentencePieceTokenizer(tmp_path / "code.model")
    assert len(tokenizer.encode("something")) <= 2
    assert len(tokenizer.encode("otherwise")) <= 2


@pytest.mark.parametrize(
    ("vocab_size", "hint"), [(1, "smallest that works is"), (10**14, "for example 32000")]
)
def test_an_absurd_vocabulary_is_refused_with_one_that_works(
    tmp_path: Path, vocab_size: int, hint: str
) -> None:
    with pytest.raises(InputError, match=f"vocab_size: {vocab_size} .*{hint}"):
        train_sentencepiece([str(SHAKESPEARE)], vocab_size, tmp_path / "x.model")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path) -> None:
    path = write_text(tmp_path / "short.txt", "to be or not to be, that is the question\n")
    output = tmp_path / "x.model"
    with pytest.raises(InputError, match=r"vocab_size: 5000 .*largest that works is (\d+)") as too_large:
        train_sentencepiece([path], 5000, output)
    with pytest.raises(InputError, match=r"vocab_size: 100 .*smallest that works is (\d+)") as too_small:
        train_sentencepiece([path], 100, output)
    assert not output.exists()
    for error, beyond in ((too_large, 1), (too_small, -1)):
        limit = int(str(error.value).split()[-1])
        train_sentencepiece([path], limit, output)
        assert SentencePieceTokenizer(output).vocab_size == limit
        with pytest.raises(InputError):
            train_sentencepiece([path], limit + beyond, output)


def test_training_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    path = write_text(tmp_path / "bad.jsonl", '{"text": "fine"}\n' * 300 + '{"text": 5}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:301: json_key 'text' is 5"):
        train_sentencepiece([path], 300, tmp_path / "x.model")
    with pytest.raises(InputError, match="no text to train"):
        train_sentencepiece([write_text(tmp_path / "b.txt", "\n \n")], 300, tmp_path / "x.model")
    assert {entry.name for entry in tmp_path.iterdir()} == {"bad.jsonl", "b.txt"}


def test_wrong_model_files_are_input_errors(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = model.read_bytes()
    for content in (b"", b"no model\n", gzip.compress(whole), whole[: len(whole) // 2]):
        path = tmp_path / "wrong.model"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"wrong\.model: not a sentencepiece model"):
            load_tokenizer("sentencepiece", path)
    with pytest.raises(InputError, match=r"missing\.model: cannot read the sentencepiece model"):
        load_tokenizer("sentencepiece", tmp_path / "missing.model")
    with pytest.raises(InputError, match=r"is a folder; name the file .* for example .*wrong\.model"):
        load_tokenizer("sentencepiece", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    path = foreign_model(tmp_path / "endless.model", eos_id=-1)
    with pytest.raises(InputError, match="no end-of-sentence piece"):
        SentencePieceTokenizer(path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 600},
        {"model_type": "unigram", "normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"model_type": "bpe", "normalization_rule_name": "identity", "user_defined_symbols": ["\n\n"]},
    ],
)
def test_other_peoples_models_encode_as_sentencepiece_does(
    options: dict[str, object], tmp_path: Path
) -> None:
    path = foreign_model(tmp_path / "foreign.model", **options)
    tokenizer = SentencePieceTokenizer(path)
    text = "  First line\n\nsecond   line \n third, no\u2581space"
    assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
    assert tokenizer.cuts == "nowhere"
