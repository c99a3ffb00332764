"""The preprocess command: what it prints, saves and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import SHAKESPEARE, names, write_jsonl, write_text

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Data, Tokenizer
from megatron_moe.data import command
from megatron_moe.data.prepare import prepare
from megatron_moe.data.tokenizers import SentencePieceTokenizer


def test_the_summary_says_what_came_out_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made" / "[shake]"
    manifest = command.run([str(SHAKESPEARE)], output, vocab_size=500, documents="paragraph")
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {name: value.strip() for name, value in lines.items()}
    assert manifest.text_bytes is not None
    ratio = manifest.text_bytes / manifest.tokens
    assert found == {
        "documents": "7,222",
        "tokens": f"{manifest.tokens:,}, {ratio:.2f} bytes a token",
        "vocabulary": "500 ids",
        "unigram entropy": f"{manifest.unigram_entropy_nats:.3f} nats a token (the loss without any context)",
        "token files": f"{output}.bin, [shake].idx, [shake].json",
        "tokenizer": f"{output}.model",
    }
    assert names(output.parent) == {"[shake].bin", "[shake].idx", "[shake].json", "[shake].model"}


def test_what_was_made_can_be_trained_on(tmp_path: Path) -> None:
    from data_samples import experiment

    command.run([str(SHAKESPEARE)], tmp_path / "x", vocab_size=500)
    data = Data(path=str(tmp_path / "x"), tokenizer=Tokenizer(model=str(tmp_path / "x.model")))
    assert prepare(experiment(data), tmp_path).vocab_size == 500


def test_a_given_model_is_used_and_empty_documents_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run([str(SHAKESPEARE)], tmp_path / "x", vocab_size=500)
    path = write_jsonl(tmp_path / "y.jsonl", ["To be", "", "or not", ""])
    capsys.readouterr()
    manifest = command.run([path], tmp_path / "y", model=tmp_path / "x.model", workers=2)
    assert manifest.tokenizer_sha256 == SentencePieceTokenizer(tmp_path / "x.model").sha256
    assert "2 (2 empty left out)" in capsys.readouterr().out
    assert not (tmp_path / "y.model").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either --tokenizer-model FILE, or --vocab-size N"),
        (
            {"model": Path("x.model"), "vocab_size": 300},
            "give either --tokenizer-model FILE, or --vocab-size N",
        ),
        ({"kind": "bytes", "vocab_size": 300}, "always 257 ids"),
        ({"kind": "bytes", "model": Path("x.model")}, "always 257 ids"),
        ({"model": Path("none.model")}, "none.model: cannot read"),
        ({"vocab_size": 90_000}, "the largest that works is"),
        ({"kind": "bytes", "workers": 0}, "--workers 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    path = write_text(tmp_path / "x.txt", "some text\n")
    with pytest.raises(InputError, match=message):
        command.run([path], tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert names(tmp_path) == {"x.txt"}


def test_a_folder_as_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; give a prefix"):
        command.run([str(SHAKESPEARE)], tmp_path, kind="bytes")


def test_an_output_that_could_not_be_read_or_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.txt", "some text\n")
    with pytest.raises(InputError, match=r"without \.bin: .*/corpus$"):
        command.run([path], tmp_path / "corpus.bin", kind="bytes")
    write_text(tmp_path / "tokenizer.json", '{"model": {}}')
    with pytest.raises(InputError, match="would replace a file that is not the manifest of token files"):
        command.run([path], tmp_path / "tokenizer", kind="bytes")
    assert (tmp_path / "tokenizer.json").read_text() == '{"model": {}}'
    assert names(tmp_path) == {"x.txt", "tokenizer.json"}


def test_no_tokenizer_stays_of_text_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.jsonl", '{"text": "some text"}\n' * 10 + "broken\n")
    with pytest.raises(InputError, match=r"x\.jsonl:11: not JSON"):
        command.run([path], tmp_path / "out", vocab_size=270)
    assert names(tmp_path) == {"x.jsonl"}


def test_an_earlier_tokenizer_stays_when_the_token_files_fail(tmp_path: Path) -> None:
    (tmp_path / "out.bin").mkdir()
    (tmp_path / "out.model").write_text("an earlier one")
    with pytest.raises(InputError, match="cannot write the token files"):
        command.run([str(SHAKESPEARE)], tmp_path / "out", vocab_size=400)
    assert names(tmp_path) == {"out.bin", "out.model"}
    assert (tmp_path / "out.model").read_text() == "an earlier one"


def test_the_size_of_a_tokenizer_is_named_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--vocab-size 100 ids are too few .*smallest that works is"):
        command.run([str(SHAKESPEARE)], tmp_path / "out", vocab_size=100)
