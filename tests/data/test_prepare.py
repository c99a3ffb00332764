"""Preparation: made once, found again, checked each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import SHAKESPEARE, experiment, names, write_jsonl, write_text
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Data, Prepare, Tokenizer
from megatron_moe.data.prepare import Prepared, PreparedSource, prepare
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.tokenizer_training import train_sentencepiece
from megatron_moe.data.tokenizers import BytesTokenizer, SentencePieceTokenizer

BYTES = Tokenizer(kind="bytes")


def from_text(path: str, tokenizer: Tokenizer = BYTES, **section: Any) -> Data:
    return Data(prepare=Prepare(input=[path], **section), tokenizer=tokenizer)


def made(data: Data, root: Path) -> Prepared:
    return prepare(experiment(data), root)


def files_of(prepared: Prepared) -> PreparedSource:
    (source,) = prepared.sources
    return source


def folder_of(prepared: Prepared) -> Path:
    return files_of(prepared).prefix.parent


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write_text(tmp_path / "corpus.txt", "Some text.\n\nMore of it.\n" * 20)


def test_text_becomes_token_files_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    data = from_text(str(SHAKESPEARE), Tokenizer(vocab_size=500), documents="paragraph")
    prepared = made(data, tmp_path)
    folder = folder_of(prepared)
    (tokenizer_folder,) = names(tmp_path / "_prepared") - {folder.name}
    assert folder.name.startswith("tinyshakespeare-") and tokenizer_folder.startswith("tokenizer-")
    assert prepared.vocab_size == 500
    assert prepared.tokenizer is not None
    model = tmp_path / "_prepared" / tokenizer_folder / "tokenizer.model"
    assert prepared.tokenizer.sha256 == SentencePieceTokenizer(model).sha256
    assert files_of(prepared).manifest.tokenizer_sha256 == prepared.tokenizer.sha256
    first = np.fromfile(f"{files_of(prepared).prefix}.bin", np.uint16)[:100].tolist()
    assert prepared.tokenizer.decode(first[: first.index(prepared.tokenizer.eod)]) == (
        SHAKESPEARE.read_text().split("\n\n")[0] + "\n"
    )


def test_a_second_call_finds_what_was_made_and_writes_nothing(tmp_path: Path, text: str) -> None:
    first = made(from_text(text), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "_prepared").rglob("*")}
    again = made(from_text(text), tmp_path)
    assert again.sources == first.sources
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "_prepared").rglob("*")} == before


def test_the_folder_is_named_by_all_that_its_content_depends_on(tmp_path: Path, text: str) -> None:
    train_sentencepiece([text], 282, tmp_path / "x.model")
    other_text = write_text(tmp_path / "other.txt", "Other text.\n" * 50)
    variants = [
        from_text(text),
        from_text(text, documents="line"),
        from_text(text, append_eod=False),
        from_text(text, Tokenizer(vocab_size=280)),
        from_text(text, Tokenizer(vocab_size=281)),
        from_text(text, Tokenizer(model=str(tmp_path / "x.model"))),
        from_text(other_text),
        Data(prepare=Prepare(input=[text, other_text]), tokenizer=BYTES),
        Data(prepare=Prepare(input=[other_text, text]), tokenizer=BYTES),
    ]
    assert len({folder_of(made(data, tmp_path)).name for data in variants}) == len(variants)
    (tmp_path / "elsewhere").mkdir()
    moved = write_text(tmp_path / "elsewhere" / "corpus.txt", Path(text).read_text())
    assert folder_of(made(from_text(moved), tmp_path)) == folder_of(made(from_text(text), tmp_path))


CALLER = """
import sys
from pathlib import Path
from megatron_moe.data.prepare import prepare
from data_samples import experiment
from megatron_moe.config.schema import Data, Prepare, Tokenizer
data = Data(prepare=Prepare(input=[sys.argv[1]], documents="line"), tokenizer=Tokenizer(vocab_size=400))
prepared = prepare(experiment(data), Path(sys.argv[2]))
(source,) = prepared.sources
print(source.prefix, prepared.tokenizer.sha256, source.manifest.tokens)
"""


def test_processes_that_come_at_once_make_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CALLER, SHAKESPEARE, tmp_path / "runs"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    paths = {"PYTHONPATH": ":".join(sys.path)}
    callers = [subprocess.Popen(command, env=paths, **pipes) for _ in range(3)]
    answers = [caller.communicate() for caller in callers]
    assert len({out for out, _ in answers}) == 1 and answers[0][0]
    assert [err.count("tokenized") for _, err in answers].count(1) == 1, "one of them did the work"
    assert len(names(tmp_path / "runs" / "_prepared")) == 2


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, text: str) -> None:
    folder = folder_of(made(from_text(text), tmp_path))
    aside = folder.with_name(f".{folder.name}.partial")
    folder.rename(aside)
    (aside / "tokens.json").unlink()
    assert folder_of(made(from_text(text), tmp_path)) == folder
    assert names(tmp_path / "_prepared") == {folder.name}


def test_wrong_text_names_the_key_and_the_line_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "qa.jsonl", ["a question"], key="question")
    for tokenizer in (BYTES, Tokenizer(vocab_size=300)):
        with pytest.raises(
            InputError, match=r"^data\.prepare: .*qa\.jsonl:1: json_key 'text' is missing.*question"
        ):
            made(from_text(path, tokenizer), tmp_path)
    with pytest.raises(InputError, match=r"^data\.prepare\.input: .*none\.txt: cannot read"):
        made(from_text(str(tmp_path / "none.txt")), tmp_path)
    with pytest.raises(InputError, match=r"^data\.tokenizer\.vocab_size: 90000 .*largest that works is \d+$"):
        made(from_text(path, Tokenizer(vocab_size=90000), json_key="question"), tmp_path)
    assert names(tmp_path) == {"qa.jsonl"}


def test_a_damaged_folder_is_named_with_the_way_out(tmp_path: Path, text: str) -> None:
    prepared = made(from_text(text), tmp_path)
    Path(f"{files_of(prepared).prefix}.bin").write_bytes(b"short")
    with pytest.raises(
        InputError, match=rf"^data\.prepare: .*tokens\.bin: .*remove the folder {folder_of(prepared)}"
    ):
        made(from_text(text), tmp_path)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        InputError, match=r"^model\.vocab_size: 256 .*257 ids of data\.tokenizer.*set it to 257"
    ):
        prepare(experiment(from_text(text), vocab_size=256), tmp_path)
    assert prepare(experiment(from_text(text), vocab_size=300), tmp_path).vocab_size == 300


@pytest.fixture
def existing(tmp_path: Path, text: str) -> Path:
    """Token files made by the preprocess command, with their own model beside them."""
    train_sentencepiece([text], 280, tmp_path / "tokens.model")
    preprocess([text], tmp_path / "tokens", SentencePieceTokenizer(tmp_path / "tokens.model"))
    return tmp_path / "tokens"


def at_path(prefix: Path, tokenizer: Tokenizer) -> Data:
    return Data(path=str(prefix), tokenizer=tokenizer)


def test_existing_files_are_taken_as_they_are(tmp_path: Path, existing: Path) -> None:
    prepared = made(at_path(existing, Tokenizer(model=f"{existing}.model")), tmp_path / "runs")
    assert files_of(prepared).prefix == existing
    assert files_of(prepared).manifest.documents == 1
    assert not (tmp_path / "runs").exists()


def test_another_tokenizer_than_that_of_the_files_is_refused(
    tmp_path: Path, existing: Path, text: str
) -> None:
    train_sentencepiece([text], 285, tmp_path / "other.model")
    for tokenizer in (BYTES, Tokenizer(model=str(tmp_path / "other.model"))):
        with pytest.raises(InputError, match=r"^data\.path: .*another tokenizer.*data\.tokenizer\.model"):
            made(at_path(existing, tokenizer), tmp_path)
    with pytest.raises(
        InputError, match=rf"^data\.tokenizer\.model: needed with data\.path.*{existing}\.model"
    ):
        made(at_path(existing, Tokenizer()), tmp_path)
    with pytest.raises(
        InputError, match=r"^data\.tokenizer\.model: .*corpus\.txt: not a sentencepiece model"
    ):
        made(at_path(existing, Tokenizer(model=text)), tmp_path)


def test_files_that_changed_since_they_were_made_are_refused(
    tmp_path: Path, existing: Path, text: str
) -> None:
    tokenizer = Tokenizer(model=f"{existing}.model")
    manifest = Path(f"{existing}.json")
    whole = manifest.read_text()
    preprocess([text], tmp_path / "other", SentencePieceTokenizer(f"{existing}.model"), append_eod=False)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"other{suffix}").rename(f"{existing}{suffix}")
    with pytest.raises(InputError, match=r"^data\.path: .*tokens\.bin: has .* where tokens\.json says"):
        made(at_path(existing, tokenizer), tmp_path)
    for content, message in (
        ("{", "not the manifest"),
        ("{}", "not the manifest"),
        (whole.replace('"format_version": 1', '"format_version": 2'), "format version 2"),
    ):
        manifest.write_text(content)
        with pytest.raises(InputError, match=rf"^data\.path: .*tokens\.json: .*{message}"):
            made(at_path(existing, tokenizer), tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_truncated_files_are_named(tmp_path: Path, existing: Path, suffix: str) -> None:
    data = at_path(existing, Tokenizer(model=f"{existing}.model"))
    path = Path(f"{existing}{suffix}")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=rf"^data\.path: .*tokens\{suffix}: has .* bytes where"):
        made(data, tmp_path)
    path.unlink()
    with pytest.raises(
        InputError, match=rf"^data\.path: .*tokens\{suffix}: cannot read the token file: No such"
    ):
        made(data, tmp_path)


def by_megatron(prefix: Path, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_files_of_megatron_lm_are_accepted_and_read_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = by_megatron(tmp_path / "lm", [[1, 1, 2, 256] * 8, [1, 3, 256] * 8])
    manifest = files_of(made(at_path(prefix, BYTES), tmp_path / "runs")).manifest
    assert manifest is not None
    assert (manifest.documents, manifest.tokens, manifest.tokenizer_sha256) == (2, 56, None)
    shares = np.array([3, 1, 1, 2]) / 7
    assert manifest.unigram_entropy_nats == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    monkeypatch.setattr("megatron_moe.data.existing._scan", None)
    assert files_of(made(at_path(prefix, BYTES), tmp_path / "runs")).manifest == manifest
    monkeypatch.undo()
    by_megatron(prefix, [[1, 1, 2, 256] * 8, [1, 3, 257] * 8])
    words = r"^data\.path: .*holds the token id 257, .* has 258 ids or more, but data\.tokenizer has 257"
    with pytest.raises(InputError, match=words):
        made(at_path(prefix, BYTES), tmp_path / "runs")


@pytest.mark.parametrize("option", ["eod_mask_loss", "reset_attention_mask"])
def test_files_without_ends_are_refused_where_an_option_goes_by_them(tmp_path: Path, option: str) -> None:
    made(at_path(by_megatron(tmp_path / "a", [[1, 2, 256] * 20] * 2), BYTES), tmp_path / "runs")
    ended = at_path(tmp_path / "a", BYTES).model_copy(update={option: True})
    assert files_of(made(ended, tmp_path / "runs")).manifest.append_eod is None
    by_megatron(tmp_path / "b", [[1, 2, 255] * 20] * 2)
    endless = at_path(tmp_path / "b", BYTES).model_copy(update={option: True})
    with pytest.raises(InputError, match=rf"^data\.path: .*b has no ends .*\(the id 256\), .*data\.{option}"):
        made(endless, tmp_path / "runs")


def test_a_part_without_a_sample_is_found_before_any_rank_starts(tmp_path: Path) -> None:
    prefix = by_megatron(tmp_path / "lm", [[1, 2, 256] * 4, [1, 3, 256]])
    with pytest.raises(InputError, match=r"^data\.split: the training part .*training\.seq_length below 15"):
        made(at_path(prefix, BYTES), tmp_path / "runs")


def test_mock_data_needs_no_files(tmp_path: Path) -> None:
    mock = Data(kind="mock")
    prepared = prepare(experiment(mock, vocab_size=1000), tmp_path)
    assert prepared == Prepared((), None, 1000)
    assert (
        prepare(experiment(Data(kind="mock", tokenizer=BYTES)), tmp_path).vocab_size
        == BytesTokenizer.vocab_size
    )
    with pytest.raises(InputError, match=r"^model\.vocab_size: needed with data\.kind: mock"):
        prepare(experiment(mock), tmp_path)
    assert names(tmp_path) == set()


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.path: nothing to read; set it, or data\.prepare\.input"):
        made(Data(), tmp_path)
