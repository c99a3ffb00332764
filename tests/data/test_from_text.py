"""Text prepared from folders and with tokenizers of every kind: found again, and told by its key."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from data_samples import names, write_jsonl, write_text

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Prepare, Tokenizer
from megatron_moe.data import input_hashes
from megatron_moe.data.from_text import PreparedText, prepare_text, prepare_tokenizer
from megatron_moe.data.inputs import file_sha256
from megatron_moe.data.tokenizers import BytesTokenizer

KEY = "data.blend.web.prepare"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "web"
    folder.mkdir()
    write_text(folder / "a.txt", "Some text.\n" * 20)
    write_jsonl(folder / "b.jsonl", ["More of it."] * 20)
    return folder


def made(tmp_path: Path, *inputs: str, **options: object) -> PreparedText:
    section = Prepare(input=list(inputs), **options)  # type: ignore[arg-type]
    return prepare_text(section, BytesTokenizer(), tmp_path / "made", KEY)


def test_a_folder_is_prepared_by_the_files_in_it(tmp_path: Path, corpus: Path) -> None:
    first = made(tmp_path, str(corpus))
    assert first.folder.name.startswith("web-") and first.manifest.documents == 21
    assert [Path(source.path).name for source in first.manifest.inputs] == ["a.txt", "b.jsonl"]
    assert made(tmp_path, f"{corpus}/*").folder.name.split("-")[1] == first.folder.name.split("-")[1]
    write_text(corpus / "ignored.csv", "1,2")
    shutil.move(corpus, tmp_path / "there" / "web")
    assert made(tmp_path, str(tmp_path / "there" / "web")) == first, "files may move"
    write_text(tmp_path / "there" / "web" / "c.txt", "one more")
    assert made(tmp_path, str(tmp_path / "there" / "web")).manifest.documents == 22


def test_a_folder_without_text_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"^{KEY}\.input: .*empty: no file in this folder"):
        made(tmp_path, str(tmp_path / "empty"))
    assert names(tmp_path) == {"empty"}


def test_what_was_made_with_records_skipped_is_not_found_where_they_are_an_error(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.jsonl", '{"text": "good"}\n' * 9 + "broken\n")
    assert made(tmp_path, path, bad_records="skip").manifest.skipped_records == 1
    with pytest.raises(InputError, match=rf"^{KEY}: .*x\.jsonl:10: not JSON"):
        made(tmp_path, path)


def test_one_tokenizer_is_trained_on_the_text_of_all_sections(tmp_path: Path) -> None:
    few = [write_text(tmp_path / "a.txt", "aaaa bbbb\n" * 50)]
    other = [write_jsonl(tmp_path / "b.jsonl", ["zzzz yyyy"] * 50, key="body")]
    sections = {"data.blend.a.prepare": Prepare(input=few)}
    spec = Tokenizer(vocab_size=268)
    assert len(prepare_tokenizer(spec, sections, tmp_path / "made").encode("zzzz")) == 4
    sections["data.blend.b.prepare"] = Prepare(input=other, json_key="body")
    both = prepare_tokenizer(spec, sections, tmp_path / "made")
    assert len(both.encode("zzzz")) < 4 and len(both.encode("aaaa")) < 4
    again = {key: sections[key] for key in sections}
    assert prepare_tokenizer(spec, again, tmp_path / "made").sha256 == both.sha256
    assert len(names(tmp_path / "made")) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            Tokenizer(kind="huggingface", model="{}/none.json"),
            r"^data\.tokenizer\.model: .*cannot read the tokenizer",
        ),
        (Tokenizer(kind="tiktoken", model="{}/x.tiktoken"), r"^data\.tokenizer\.model: .*not ranks"),
        (Tokenizer(model="{}"), r"^data\.tokenizer\.model: .* is a folder"),
        (
            Tokenizer(model="{}/spm.model", eod="<no>"),
            r"^data\.tokenizer\.eod: .*spm\.model has no piece '<no>'",
        ),
        (Tokenizer(), r"^data\.tokenizer\.vocab_size: needed"),
    ],
)
def test_wrong_tokenizers_are_told_by_their_key(tmp_path: Path, spec: Tokenizer, message: str) -> None:
    from megatron_moe.data.tokenizer_training import train_sentencepiece

    text = write_text(tmp_path / "x.txt", "some text\n" * 20)
    train_sentencepiece([text], 270, tmp_path / "spm.model")
    (tmp_path / "x.tiktoken").write_text("nothing of the kind\n")
    if spec.model is not None:
        spec = spec.model_copy(update={"model": spec.model.format(tmp_path)})
    with pytest.raises(InputError, match=message):
        prepare_tokenizer(spec, {KEY: Prepare(input=[text])}, tmp_path / "made")


def test_a_piece_of_ones_own_ends_documents(tmp_path: Path) -> None:
    from megatron_moe.data.tokenizer_training import train_sentencepiece

    train_sentencepiece([write_text(tmp_path / "x.txt", "some text\n" * 20)], 270, tmp_path / "m")
    plain, same, other = (
        prepare_tokenizer(Tokenizer(model=str(tmp_path / "m"), eod=eod), {}, tmp_path)
        for eod in (None, "</s>", "<pad>")
    )
    assert (plain.eod, same.eod, other.eod) == (1, 1, 2)
    assert plain.sha256 == same.sha256 == file_sha256(str(tmp_path / "m")) != other.sha256


def test_hashes_of_much_text_are_noted_until_a_file_changes(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_hashes, "_WORTH_NOTING_BYTES", 0)
    monkeypatch.setattr(input_hashes, "_SETTLED_NS", -1)
    files = [str(corpus / "a.txt"), str(corpus / "b.jsonl")]
    hashes = input_hashes.hashes_of(files, tmp_path / "notes")
    assert hashes == [file_sha256(path) for path in files]
    monkeypatch.setattr(input_hashes, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert input_hashes.hashes_of(files, tmp_path / "notes") == hashes
    monkeypatch.setattr(input_hashes, "file_sha256", file_sha256)
    before = os.stat(files[0])
    (corpus / "a.txt").write_text("Some tixt.\n" * 20)  # as long, and put back to the same time
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (
        input_hashes.hashes_of(files, tmp_path / "notes") == [file_sha256(path) for path in files] != hashes
    )


def test_hashes_of_a_file_that_just_changed_are_not_noted(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_hashes, "_WORTH_NOTING_BYTES", 0)
    monkeypatch.setattr(input_hashes, "_SETTLED_NS", time.time_ns())
    input_hashes.hashes_of([str(corpus / "a.txt")], tmp_path / "notes")
    assert names(tmp_path / "notes") == set()
